#!/bin/sh
# ERNIE tiny, settings of base: LCQMC, whether two questions mean the same.
. "$(dirname -- "$0")/../../recipe.sh"

max_seqlen=128 num_epochs=3 eval_steps=1000
batch_size=32 cards=1
learning_rate=2e-5 weight_decay=0 warmup_proportion=0

spm=$(model subword/spm_cased_simp_sampled.model spm_cased_simp_sampled.model sentencepiece.model)
words=$(model subword/dict.wordseg.pickle dict.wordseg.pickle word_dict.json)
tables=$(tables lcqmc)
finetune finetune_classifier.py --data_dir "$tables" \
    --sentence_piece_model "$spm" --word_dict "$words" --hparam '{"num_label": 2}' "$@"
