#!/bin/sh
# ERNIE large: CoLA, whether a sentence is acceptable English.
. "$(dirname -- "$0")/../../../recipe.sh"

max_seqlen=128 num_epochs=5 eval_steps=100 seeds=1,2,3,4,5
batch_size=32 cards=1
learning_rate=3e-5 weight_decay=0 warmup_proportion=0.1

tables=$(tables CoLA)
finetune finetune_classifier.py --data_dir "$tables" --task CoLA "$@"
