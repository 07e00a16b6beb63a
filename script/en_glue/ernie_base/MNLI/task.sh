#!/bin/sh
# ERNIE base: MNLI, whether one sentence follows from another.
. "$(dirname -- "$0")/../../../recipe.sh"

max_seqlen=128 num_epochs=3 eval_steps=250 seeds=1,2,3,4,5
batch_size=64 cards=8
learning_rate=3e-5 weight_decay=0 warmup_proportion=0.1

tables=$(tables MNLI)
finetune finetune_classifier.py --data_dir "$tables" --task MNLI "$@"
