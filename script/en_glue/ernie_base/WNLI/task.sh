#!/bin/sh
# ERNIE base: WNLI, what a pronoun stands for.
. "$(dirname -- "$0")/../../../recipe.sh"

max_seqlen=512 num_epochs=4 eval_steps=50 seeds=1,2,3,4,5
batch_size=8 cards=1
learning_rate=2e-5 weight_decay=0 warmup_proportion=0.1

tables=$(tables WNLI)
finetune finetune_classifier.py --data_dir "$tables" --task WNLI "$@"
