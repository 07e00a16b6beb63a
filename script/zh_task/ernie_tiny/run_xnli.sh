#!/bin/sh
# ERNIE tiny, settings of base: XNLI, whether one sentence follows from another; a batch is counted in tokens.
. "$(dirname -- "$0")/../../recipe.sh"

max_seqlen=512 num_epochs=3 eval_steps=100
batch_size=8192 cards=8
learning_rate=1e-4 weight_decay=0.01 warmup_proportion=0

spm=$(model subword/spm_cased_simp_sampled.model spm_cased_simp_sampled.model sentencepiece.model)
words=$(model subword/dict.wordseg.pickle dict.wordseg.pickle word_dict.json)
tables=$(tables xnli)
finetune finetune_classifier.py --data_dir "$tables" \
    --sentence_piece_model "$spm" --word_dict "$words" \
    --task xnli --hparam '{"in_tokens": true}' "$@"
