#!/bin/sh
# ERNIE base: BQ Corpus, whether two questions to a bank mean the same.
. "$(dirname -- "$0")/../../recipe.sh"

max_seqlen=128 num_epochs=3 eval_steps=500
batch_size=64 cards=1
learning_rate=3e-5 weight_decay=0.01 warmup_proportion=0

tables=$(tables bq)
finetune finetune_classifier.py --data_dir "$tables" --hparam '{"num_label": 2}' "$@"
