#!/bin/sh
# ERNIE large: NLPCC-DBQA, which candidate answers a question.
. "$(dirname -- "$0")/../../recipe.sh"

max_seqlen=512 num_epochs=3 eval_steps=1000
batch_size=8 cards=8
learning_rate=1e-5 weight_decay=0.01 warmup_proportion=0

tables=$(tables nlpcc-dbqa)
finetune finetune_ranker.py --data_dir "$tables" "$@"
