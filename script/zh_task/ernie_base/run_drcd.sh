#!/bin/sh
# ERNIE base: DRCD, reading comprehension in traditional characters.
. "$(dirname -- "$0")/../../recipe.sh"

max_seqlen=512 num_epochs=2 eval_steps=200
batch_size=16 cards=4
learning_rate=5e-5 weight_decay=0.01 warmup_proportion=0

train=$(data drcd/train.json drcd/DRCD_training.json drcd/DRCD_training.json.gz)
dev=$(data drcd/dev.json drcd/DRCD_dev.json drcd/DRCD_dev.json.gz)
test=$(data drcd/test.json drcd/DRCD_test.json drcd/DRCD_test.json.gz)
finetune finetune_mrc.py --doc_stride 128 --train_set "$train" --dev_set "$dev" --test_set "$test" "$@"
