#!/bin/sh
# ERNIE tiny, settings of base: ChnSentiCorp, the sentiment of reviews.
. "$(dirname -- "$0")/../../recipe.sh"

max_seqlen=256 num_epochs=10 eval_steps=100
batch_size=24 cards=1
learning_rate=5e-5 weight_decay=0.01 warmup_proportion=0

spm=$(model subword/spm_cased_simp_sampled.model spm_cased_simp_sampled.model sentencepiece.model)
words=$(model subword/dict.wordseg.pickle dict.wordseg.pickle word_dict.json)
tables=$(tables chnsenticorp)
finetune finetune_classifier.py --data_dir "$tables" \
    --sentence_piece_model "$spm" --word_dict "$words" --hparam '{"num_label": 2}' "$@"
