#!/bin/sh
# ERNIE base: XNLI, whether one sentence follows from another; a batch is counted in tokens.
. "$(dirname -- "$0")/../../recipe.sh"

max_seqlen=512 num_epochs=3 eval_steps=100
batch_size=8192 cards=8
learning_rate=1e-4 weight_decay=0.01 warmup_proportion=0

tables=$(tables xnli)
finetune finetune_classifier.py --data_dir "$tables" --task xnli --hparam '{"in_tokens": true}' "$@"
