#!/usr/bin/env bash
# Makes docs/repairs.md: what each repair of SmolLM2-135M-Instruct without 6 of its 30 layers gains, and how long it takes.
#
#   tools/repairs.sh DATA [OUTPUT]
#
# DATA is that of tools/leaderboard.sh. All rows lack the layers that `angular` chooses. Every compensation in COMPENSATIONS is measured
# alone; every kind of training in TRAININGS is measured after every compensation in FIRST (none: the cut alone). OUTPUT (default:
# repairs-output) keeps what is finished, so that it can be interrupted and started again. WINDOWS and LIMIT are the windows of a text and
# the examples of a task, TOKENS those of a training.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: tools/repairs.sh DATA [OUTPUT]}
output=${2:-repairs-output}
bin=${SGLP_BIN:-.venv/bin}
model=$("$bin/python" tools/fetch_smollm2.py)
mkdir -p "$output"
"$bin/python" tools/calibration_texts.py "$data" "$output/texts"
text="jsonl:$output/texts/training.jsonl:text"

# settings KIND: how it trains, as a healing recipe
settings() {
    echo "data: '$text'"
    echo "tokens: ${TOKENS:-20480}"
    printf 'seq_len: 256\nrepeat: true\n'
    case $1 in
    seam-mse) printf 'train: seam\nhidden_weight: 1\n' ;;
    seam-pair) printf 'train: seam\nhidden_weight: 0.5\n' ;;
    *) echo "train: $1" ;;
    esac
}

# measure NAME METHODS OPTIONS...: one comparison
measure() {
    "$bin/python" -m sglp_llm compare "$model" --criteria "$2" --drops 6 --protect-first 4 --protect-last 2 \
        --calibration "$text" --samples 64 --seq-len 256 --trial-samples 4 --dtype float32 \
        --eval "text:$data/wikitext2_test.txt.gz" --eval "jsonl:$data/c4_sample.jsonl.gz:text" --window 512 --max-windows "${WINDOWS:-64}" \
        --suite offline --data-dir "$data" --limit "${LIMIT:-100}" --measure-dtype bfloat16 \
        --measured "$output/measured" --output "$output/$1" "${@:3}" >/dev/null
    "$bin/python" tools/repairs_page.py "$output" docs/repairs.md
}

methods=angular
for name in ${COMPENSATIONS-scale linear refit learned}; do
    methods+=,angular+$name
done
measure closed-form "$methods"
for kind in ${TRAININGS-seam-mse seam-pair seam lora partial full}; do
    settings "$kind" >"$output/$kind.yaml"
    methods=
    for name in ${FIRST-none refit learned}; do
        methods+=,angular+$name+heal
    done
    measure "$kind" "${methods#,}" --heal-recipe "$output/$kind.yaml"
done
