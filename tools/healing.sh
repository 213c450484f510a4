#!/usr/bin/env bash
# Makes docs/healing.md: what training adds to SmolLM2-135M-Instruct without 6 and 9 of its 30 layers.
#
#   tools/healing.sh DATA [OUTPUT]
#
# DATA holds wikitext2_train.txt.gz, wikitext2_test.txt.gz and c4_sample.jsonl.gz, and the files that the suite offline reads. The text
# that is trained on is WikiText-2 train and C4 from document 1000 on; what is measured on is neither. DROPS, STARTS, TRAINED, TOKENS,
# WINDOWS and LIMIT choose what is run. What is finished is kept in OUTPUT, so that it can be interrupted and started again.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: tools/healing.sh DATA [OUTPUT]}
output=${2:-healing-output}
bin=${SGLP_BIN:-.venv/bin}
model=$("$bin/python" tools/fetch_smollm2.py)
mkdir -p "$output"
"$bin/python" tools/calibration_texts.py "$data" "$output/texts"
text="jsonl:$PWD/$output/texts/training.jsonl:text"
[[ $output = /* ]] && text="jsonl:$output/texts/training.jsonl:text"

run() {
    "$bin/python" -m sglp_llm "$@"
}

# measure NAME FOLDER: perplexity on both texts, and tasks
measure() {
    local name=$1 folder=$2
    for part in "wikitext2 text:$data/wikitext2_test.txt.gz" "c4 jsonl:$data/c4_sample.jsonl.gz:text"; do
        read -r label spec <<<"$part"
        [ -s "$output/$name.$label.json" ] || {
            run eval "$folder" --data "$spec" --window 512 --max-windows "${WINDOWS:-302}" --batch-size 4 --json >"$output/$name.$label.tmp"
            mv "$output/$name.$label.tmp" "$output/$name.$label.json"
        }
    done
    for suite in ${SUITES-offline generation_offline}; do
        [ -s "$output/$name.$suite.json" ] || {
            run eval "$folder" --suite "$suite" --data-dir "$data" --limit "${LIMIT:-100}" --batch-size 8 --json >"$output/$name.$suite.tmp"
            mv "$output/$name.$suite.tmp" "$output/$name.$suite.json"
        }
    done
}

measure dense "$model"
for drop in ${DROPS:-6 9}; do
    for start in ${STARTS:-sglp search+linear best}; do
        name="$start-$drop"
        case $start in
        search+linear) options="--criterion search --compensate linear" ;;
        best) options="--preset best" ;;
        *) options="--criterion $start" ;;
        esac
        [ -f "$output/$name/config.json" ] ||
            run prune "$model" --drop "$drop" $options --protect-first 4 --protect-last 2 --calibration "$text" --samples 64 --seq-len 256 \
                --output "$output/$name"
        measure "$name" "$output/$name"
        for trained in ${TRAINED:-full partial seam lora full-no-teacher}; do
            options="--train ${trained%-no-teacher}"
            [[ $trained = *-no-teacher ]] && options+=" --no-teacher"
            folder="$output/$name+$trained"
            [ -f "$folder/config.json" ] || {
                resume=$([ -d "$folder.healing" ] && echo --resume || true)
                run heal "$output/$name" --output "$folder" --data "$text" --tokens "${TOKENS:-20k}" --seq-len 256 $options $resume
            }
            measure "$name+$trained" "$folder"
        done
    done
done
how="DROPS=\"${DROPS:-6 9}\" STARTS=\"${STARTS:-sglp search+linear best}\" TOKENS=${TOKENS:-20k} WINDOWS=${WINDOWS:-302} LIMIT=${LIMIT:-100}"
"$bin/python" tools/healing_page.py "$output" docs/healing.md "$how"
