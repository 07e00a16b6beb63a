#!/bin/sh
# Converts a downloaded GLUE folder for the recipes: sh script/en_glue/preprocess/cvt.sh GLUE_DATA [OUTPUT]
# What it makes goes to ./glue_data_processed, or to OUTPUT; then TASK_DATA_PATH is that folder.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/../../.." && pwd)
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
exec "${PYTHON:-python}" "$root/script/en_glue/preprocess/convert.py" "$@"
