#!/bin/sh
# ERNIE base: ChnSentiCorp, the sentiment of reviews.
. "$(dirname -- "$0")/../../recipe.sh"

max_seqlen=256 num_epochs=10 eval_steps=100
batch_size=24 cards=1
learning_rate=5e-5 weight_decay=0.01 warmup_proportion=0

tables=$(tables chnsenticorp)
finetune finetune_classifier.py --data_dir "$tables" --hparam '{"num_label": 2}' "$@"
