#!/bin/sh
# ERNIE base: THUC, the subject of a news story.
. "$(dirname -- "$0")/../../recipe.sh"

max_seqlen=512 num_epochs=3 eval_steps=1000
batch_size=8 cards=1
learning_rate=3e-5 weight_decay=0.01 warmup_proportion=0

tables=$(tables thuc)
finetune finetune_classifier.py --data_dir "$tables" --hparam '{"num_label": 10}' "$@"
