#!/bin/sh
# ERNIE base: RTE, whether one sentence follows from another.
. "$(dirname -- "$0")/../../../recipe.sh"

max_seqlen=128 num_epochs=4 eval_steps=200 seeds=1,2,3,4,5
batch_size=4 cards=1
learning_rate=2e-5 weight_decay=0 warmup_proportion=0.1

tables=$(tables RTE)
finetune finetune_classifier.py --data_dir "$tables" --task RTE "$@"
