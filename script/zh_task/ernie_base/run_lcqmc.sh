#!/bin/sh
# ERNIE base: LCQMC, whether two questions mean the same.
. "$(dirname -- "$0")/../../recipe.sh"

max_seqlen=128 num_epochs=3 eval_steps=1000
batch_size=32 cards=1
learning_rate=2e-5 weight_decay=0 warmup_proportion=0

tables=$(tables lcqmc)
finetune finetune_classifier.py --data_dir "$tables" --hparam '{"num_label": 2}' "$@"
