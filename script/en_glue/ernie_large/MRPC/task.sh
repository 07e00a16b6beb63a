#!/bin/sh
# ERNIE large: MRPC, whether two sentences mean the same.
. "$(dirname -- "$0")/../../../recipe.sh"

max_seqlen=128 num_epochs=4 eval_steps=50 seeds=1,2,3,4,5
batch_size=8 cards=2
learning_rate=3e-5 weight_decay=0 warmup_proportion=0.1

tables=$(tables MRPC)
finetune finetune_classifier.py --data_dir "$tables" --task MRPC "$@"
