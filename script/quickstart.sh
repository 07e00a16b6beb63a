#!/usr/bin/env bash
# The main job in a few minutes on a CPU: train a classifier, export the best model, predict from stdin.
# Everything it makes goes to quickstart_output/ (or $QUICKSTART_DIR) and .venv/ (or $VENV).
set -euo pipefail
case ${1-} in
    "") ;;
    -h | --help) sed -n '2,3s/^# //p' "$0"; exit ;;
    *) echo "$0 takes no arguments, got $1; --help says what it does" >&2; exit 2 ;;
esac
out=${QUICKSTART_DIR:-$(dirname "$0")/../quickstart_output}
mkdir -p -- "$out"
out=$(CDPATH= cd -- "$out" && pwd -P)
cd "$(dirname "$0")/.."
source script/environment.sh
use_environment cpu
python=$VENV/bin/python
started=$SECONDS

echo "== writing synthetic reviews to $out/data"
"$python" script/quickstart/make_reviews.py "$out/data"

echo "== fine-tuning a small ERNIE from random weights"
"$python" example/finetune_classifier.py \
    --data_dir "$out/data" \
    --vocab_file "$out/data/vocab.txt" \
    --cache_dir "$out/cache" \
    --max_seqlen 64 \
    --run_config "$("$python" -c 'import json, sys; print(json.dumps({"model_dir": sys.argv[1]}))' "$out/model")" \
    --run_config '{
        "max_steps": 750,
        "eval_steps": 125,
        "save_steps": 125,
        "log_steps": 125
    }' \
    --hparam script/quickstart/ernie_config.json \
    --hparam '{
        "batch_size": 32,
        "learning_rate": 0.0005,   # large, since the weights are new
        "warmup_proportion": 0.1,
        "weight_decay": 0.01
    }'

echo "== classifying the test texts from standard input"
tail -n +2 "$out/data/test.tsv" | cut -f2 > "$out/input.txt"
"$python" example/finetune_classifier.py --do_predict --format jsonl \
    --bundle "$out/model/best/inference" < "$out/input.txt" > "$out/output.jsonl"
paste -d '\n' <(head -n 3 "$out/input.txt") <(head -n 3 "$out/output.jsonl")

echo "== results"
"$python" script/quickstart/results.py "$out"
echo "took $((SECONDS - started)) s without installation"
