#!/usr/bin/env bash
# Makes docs/healing.md: what training adds to SmolLM2-135M-Instruct without 6 and 9 of its 30 layers.
#
#   tools/healing.sh DATA [OUTPUT [STUDY ...]]
#
# DATA holds wikitext2_train.txt.gz, wikitext2_test.txt.gz, c4_sample.jsonl.gz and alpaca_5k.jsonl.gz, and the files that the suite
# offline reads. Nothing that is trained or calibrated on is measured on. The studies are, all of them by default:
#
#   parameters  for each model in STARTS: every kind of training in TRAINED, with TOKENS tokens; perplexity on SAMPLE windows
#   long        for each model in LONG: all parameters for MINUTES; perplexity on WHOLE windows, tasks and generation
#   rates       20k tokens from angular+refit-6 with each of RATES, sequences a step x learning rate; held-out divergence
#   presets     each preset in PRESETS, with all that it does; perplexity on WHOLE windows, tasks and generation
#   texts       the preset fast calibrated and trained on one kind of text
#
# SAMPLES are the sequences of 256 tokens that a removal is calibrated on, TEXTS the kinds of text in the last study, and LIMIT the
# examples of a task. A model's name is what shortened it and the number of layers that it lacks. Perplexity and tasks are computed in
# DTYPE. What is finished is kept in OUTPUT, so that it can be interrupted and started again.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: tools/healing.sh DATA [OUTPUT [STUDY ...]]}
output=${2:-healing-output}
studies=${*:3}
bin=${SGLP_BIN:-.venv/bin}
model=$("$bin/python" tools/fetch_smollm2.py)
mkdir -p "$output"
"$bin/python" tools/calibration_texts.py "$data" "$output/texts"
texts=$(cd "$output/texts" && pwd)
mixed="jsonl:$texts/training.jsonl:text"

run() {
    "$bin/python" -m sglp_llm "$@"
}

# kept FILE COMMAND...: the command's output is the file, unless it is there
kept() {
    [ -s "$1" ] || { "${@:2}" >"$1.partial" && mv "$1.partial" "$1"; }
}

# perplexities NAME FOLDER KIND WINDOWS: of the texts that nothing is trained on
perplexities() {
    local part label spec
    for part in "wikitext2 text:$data/wikitext2_test.txt.gz" "c4 jsonl:$data/c4_sample.jsonl.gz:text" "alpaca jsonl:$texts/alpaca_rest.jsonl:text"; do
        read -r label spec <<<"$part"
        [ "$label" = alpaca ] && [ "$3" != texts ] && continue
        kept "$output/$1.$3.$label.json" run eval "$2" --data "$spec" --window 512 --max-windows "$4" --batch-size 4 \
            --dtype "${DTYPE:-bfloat16}" --json
    done
}

# scores NAME FOLDER KIND SUITE...
scores() {
    local suite folder
    for suite in "${@:4}"; do
        folder=()
        [ "$suite" = offline ] && folder=(--data-dir "$data")
        kept "$output/$1.$3.$suite.json" run eval "$2" --suite "$suite" "${folder[@]}" --limit "${LIMIT:-100}" --batch-size 8 \
            --dtype "${DTYPE:-bfloat16}" --json
    done
}

# shorten NAME CALIBRATION: NAME is the method and the number of layers, and may end in =TEXT
shorten() {
    local method=${1%%=*} options
    case $method in
    *+*-*) options="--criterion ${method%%+*} --compensate $(x=${method#*+}; echo "${x%-*}")" ;;
    learned-*) options="--criterion search --trial-samples 4 --compensate learned" ;;
    closed-form-* | fast-* | best-* | paper-*) options="--preset ${method%-*}" ;;
    *) options="--criterion ${method%-*}" ;;
    esac
    [ -f "$output/$1/config.json" ] && return
    local start=$SECONDS
    run prune "$model" --drop "${method##*-}" $options --protect-first 4 --protect-last 2 --calibration "$2" --samples "${SAMPLES:-64}" --seq-len 256 \
        --output "$output/$1"
    echo $((SECONDS - start)) >"$output/$1.seconds"
}

# train NAME ENDING TEXT OPTIONS...: heals NAME to NAME+ENDING
train() {
    local folder="$output/$1+$2" resume=
    [ -d "$folder.healing" ] && resume=--resume
    [ -f "$folder/config.json" ] || run heal "$output/$1" --output "$folder" --data "$3" --seq-len 256 "${@:4}" $resume
}

parameters() {
    local name trained options
    perplexities dense "$model" sample "${SAMPLE:-64}"
    for name in ${STARTS:-sglp-6 search+linear-6 learned-6 sglp-9 search+linear-9 learned-9}; do
        shorten "$name" "$mixed"
        perplexities "$name" "$output/$name" sample "${SAMPLE:-64}"
        for trained in ${TRAINED:-full partial seam lora full-no-teacher partial-no-teacher lora-no-teacher}; do
            options="--tokens ${TOKENS:-20k} --train ${trained%-no-teacher}"
            [[ $trained = *-no-teacher ]] && options+=" --no-teacher"
            train "$name" "$trained" "$mixed" $options
            perplexities "$name+$trained" "$output/$name+$trained" sample "${SAMPLE:-64}"
        done
    done
}

long() {
    local name folder
    perplexities dense "$model" whole "${WHOLE:-302}"
    scores dense "$model" whole offline generation_offline
    for name in ${LONG:-search+linear-6 sglp-6 search+linear-9}; do
        shorten "$name" "$mixed"
        train "$name" long "$mixed" --minutes "${MINUTES:-30}"
        for folder in "$name" "$name+long"; do
            perplexities "$folder" "$output/$folder" whole "${WHOLE:-302}"
            scores "$folder" "$output/$folder" whole offline generation_offline
        done
    done
}

rates() {
    local rate
    shorten angular+refit-6 "$mixed"
    for rate in ${RATES:-4x4e-4 4x2e-4 4x1e-4 2x2e-4 2x1.5e-4 2x1e-4 1x1e-4 1x5e-5}; do
        train angular+refit-6 "rate-$rate" "$mixed" --tokens "${TOKENS:-20k}" --sequences "${rate%x*}" --learning-rate "${rate#*x}"
    done
}

presets() {
    local name
    perplexities dense "$model" preset "${WHOLE:-302}"
    scores dense "$model" preset offline generation_offline
    for name in ${PRESETS:-closed-form-6 fast-6 best-6 closed-form-9 fast-9 best-9}; do
        shorten "$name" "$mixed"
        perplexities "$name" "$output/$name" preset "${WHOLE:-302}"
        scores "$name" "$output/$name" preset offline generation_offline
    done
}

texts() {
    local label spec
    perplexities dense "$model" texts "${SAMPLE:-64}"
    scores dense "$model" texts offline
    for label in ${TEXTS:-wikitext2 c4 alpaca self}; do
        case $label in
        wikitext2) spec="text:$data/wikitext2_train.txt.gz" ;;
        self) spec=self ;;
        *) spec="jsonl:$texts/$label.jsonl:text" ;;
        esac
        shorten "fast-6=$label" "$spec"
        scores "fast-6=$label" "$output/fast-6=$label" texts offline
        perplexities "fast-6=$label" "$output/fast-6=$label" texts "${SAMPLE:-64}"
    done
}

for study in ${studies:-parameters long rates presets texts}; do
    "$study"
done
"$bin/python" tools/healing_page.py "$output" docs/healing.md
