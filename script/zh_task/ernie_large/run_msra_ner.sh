#!/bin/sh
# ERNIE large: MSRA-NER (SIGHAN 2006), names of persons, places and organisations.
. "$(dirname -- "$0")/../../recipe.sh"

max_seqlen=256 num_epochs=6 eval_steps=500
batch_size=16 cards=1
learning_rate=1e-5 weight_decay=0.01 warmup_proportion=0

tables=$(tables msra_ner)
finetune finetune_ner.py --data_dir "$tables" "$@"
