#!/bin/sh
# ERNIE large: CMRC2018, reading comprehension.
. "$(dirname -- "$0")/../../recipe.sh"

max_seqlen=512 num_epochs=2 eval_steps=100
batch_size=8 cards=8
learning_rate=3e-5 weight_decay=0.01 warmup_proportion=0

train=$(data cmrc2018/train.json cmrc2018/cmrc2018_train.json cmrc2018/cmrc2018_train.json.gz)
dev=$(data cmrc2018/dev.json cmrc2018/cmrc2018_dev.json cmrc2018/cmrc2018_dev.json.gz)
finetune finetune_mrc.py --doc_stride 128 --train_set "$train" --dev_set "$dev" "$@"
