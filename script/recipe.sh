# Sourced by the recipes in zh_task/ and en_glue/. What a user sets is in README.md beside this file.
#
# A recipe sets, as published: max_seqlen, num_epochs, batch_size (of one card) and cards, learning_rate,
# weight_decay, warmup_proportion; besides, eval_steps, and seeds if it trains more than once. Then it calls
# `finetune`. Here is what they share: the checks before Python starts, the model's flags, the call.
set -eu

PYTHON=${PYTHON:-python}
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
root=${here%/script/*}
recipe=${here#"$root"/script/}/${0##*/} # zh_task/ernie_base/run_drcd.sh, en_glue/ernie_base/CoLA/task.sh
recipe=${recipe%/task.sh}
output=${OUTPUT_DIR:-output/${recipe%.sh}}
seeds=

fail() {
    echo "error: $*" >&2
    exit 2
}

# check_folder VARIABLE VALUE WHAT
check_folder() {
    [ -n "$2" ] || fail "$1 is not set. Name $3: export $1=/path/to/it"
    [ -d "$2" ] || fail "$1 is $2, which is no folder; expected $3."
}

# first_of VARIABLE FOLDER NAME...: prints the path of the first NAME that is there.
first_of() (
    variable=$1 folder=${2%/}
    shift 2
    for name; do
        if [ -e "$folder/$name" ]; then
            printf '%s\n' "$folder/$name"
            exit
        fi
    done
    names=$(printf ' or %s' "$@")
    fail "$variable is $folder, in which there is no ${names# or }."
)

data() { first_of TASK_DATA_PATH "$TASK_DATA_PATH" "$@"; }
model() { first_of MODEL_PATH "$MODEL_PATH" "$@"; }

# tables NAME: prints the path of a folder of tables, if it has those to train and to evaluate on.
tables() (
    folder=$(data "$1")
    data "$1/train.tsv" "$1/train.tsv.gz" "$1/train" "$1/multinli.train.zh.tsv" > /dev/null
    data "$1/dev.tsv" "$1/dev.tsv.gz" "$1/dev" "$1/xnli.dev.tsv" \
        "$1/dev_matched.tsv" "$1/m/dev.tsv" > /dev/null
    printf '%s\n' "$folder"
)

# processes FLAG...: prints how many share the work: what the flag --nproc says, else NPROC, else 1.
processes() (
    number=${NPROC:-1} before=
    for flag; do
        case $before in --nproc) number=$flag ;; esac
        case $flag in --nproc=*) number=${flag#*=} ;; esac
        before=$flag
    done
    case $number in
    auto) exec "$PYTHON" -c 'from propeller.launch import num_ranks; print(num_ranks("auto"))' ;;
    '' | 0* | *[!0-9]*) fail "NPROC, or --nproc, is '$number'; expected a number of cards, or auto." ;;
    esac
    echo "$number"
)

# finetune EXAMPLE FLAG...: trains by a script of example/; if there are seeds, once with each.
finetune() {
    example=$root/example/$1
    shift
    nproc=$(processes "$@")
    seeds=${SEEDS:-$seeds}
    # A step learns from the batches of all cards that the settings were published for; fewer cards take
    # theirs in parts, one after the other, so that none holds more than one published batch.
    set -- \
        --max_seqlen "$max_seqlen" \
        --run_config "{\"eval_steps\": $eval_steps, \"micro_batches\": $(((cards + nproc - 1) / nproc))}" \
        --hparam "{\"batch_size\": $((batch_size * cards)), \"num_epochs\": $num_epochs}" \
        --hparam "{\"learning_rate\": $learning_rate, \"lr_schedule\": \"linear\"}" \
        --hparam "{\"warmup_proportion\": $warmup_proportion, \"weight_decay\": $weight_decay}" \
        "$@"
    [ "$nproc" = 1 ] || set -- --nproc "$nproc" "$@"
    if [ -d "$MODEL_PATH/params" ] && [ ! -e "$MODEL_PATH/model.safetensors" ]; then # as ERNIE's downloads
        vocab=$(model vocab.txt)
        config=$(model ernie_config.json)
        set -- --warm_start_from "$MODEL_PATH/params" --vocab_file "$vocab" --hparam "$config" "$@"
    else
        model ernie_config.json config.json bert_config.json > /dev/null
        set -- --warm_start_from "$MODEL_PATH" "$@"
    fi
    if [ -n "$seeds" ]; then
        set -- -m ernie.commands.main tune --output_dir "$output" --seeds "$seeds" -- "$PYTHON" "$example" "$@"
    else
        model_dir=$(printf '%s' "$output" | sed 's/[\\"]/\\&/g') # as JSON writes it
        set -- "$example" --run_config "{\"model_dir\": \"$model_dir\"}" "$@"
    fi
    exec "$PYTHON" "$@"
}

check_folder TASK_DATA_PATH "${TASK_DATA_PATH:-}" "the folder of the task data"
check_folder MODEL_PATH "${MODEL_PATH:-}" "the folder of the pretrained model"
command -v "$PYTHON" > /dev/null || fail "there is no $PYTHON here. Name one: export PYTHON=/path/to/python"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
