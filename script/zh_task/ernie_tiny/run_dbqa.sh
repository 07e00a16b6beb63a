#!/bin/sh
# ERNIE tiny, settings of base: NLPCC-DBQA, which candidate answers a question.
. "$(dirname -- "$0")/../../recipe.sh"

max_seqlen=512 num_epochs=3 eval_steps=1000
batch_size=8 cards=8
learning_rate=2e-5 weight_decay=0.01 warmup_proportion=0

spm=$(model subword/spm_cased_simp_sampled.model spm_cased_simp_sampled.model sentencepiece.model)
words=$(model subword/dict.wordseg.pickle dict.wordseg.pickle word_dict.json)
tables=$(tables nlpcc-dbqa)
finetune finetune_ranker.py --data_dir "$tables" --sentence_piece_model "$spm" --word_dict "$words" "$@"
