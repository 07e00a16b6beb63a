#!/bin/sh
# ERNIE base: STS-B, how alike two sentences are, from 0 to 5.
. "$(dirname -- "$0")/../../../recipe.sh"

max_seqlen=128 num_epochs=3 eval_steps=20 seeds=1,2,3,4,5
batch_size=16 cards=8
learning_rate=5e-5 weight_decay=0 warmup_proportion=0.1

tables=$(tables STS-B)
finetune finetune_classifier.py --data_dir "$tables" --task STS-B "$@"
