#!/usr/bin/env bash
# Makes docs/healing.md: what training adds to SmolLM2-135M-Instruct without 6 and 9 of its 30 layers.
#
#   tools/healing.sh DATA [OUTPUT]
#
# DATA holds wikitext2_train.txt.gz, wikitext2_test.txt.gz and c4_sample.jsonl.gz, and the files that the suite offline reads. The text
# that is trained on is WikiText-2 train and C4 from document 1000 on; what is measured on is neither. Where 6 layers are missing, all
# parameters are also trained on the texts of TEXTS, each alone. DROPS, STARTS, TRAINED, TEXTS, TOKENS, WINDOWS and LIMIT choose what
# is run. What is finished is kept in OUTPUT, so that it can be interrupted and started again.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: tools/healing.sh DATA [OUTPUT]}
output=${2:-healing-output}
bin=${SGLP_BIN:-.venv/bin}
model=$("$bin/python" tools/fetch_smollm2.py)
mkdir -p "$output"
"$bin/python" tools/calibration_texts.py "$data" "$output/texts"
folder_of_texts=$(cd "$output/texts" && pwd)
text="jsonl:$folder_of_texts/training.jsonl:text"

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

# train_and_measure NAME TRAINED TEXT OPTIONS: heals the shortened model NAME
train_and_measure() {
    local name=$1 trained=$2 spec=$3 folder="$output/$1+$2" resume=
    shift 3
    [ -f "$folder/config.json" ] || {
        [ -d "$folder.healing" ] && resume=--resume
        run heal "$output/$name" --output "$folder" --data "$spec" --tokens "${TOKENS:-20k}" --seq-len 256 "$@" $resume
    }
    measure "$name+$trained" "$folder"
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
            train_and_measure "$name" "$trained" "$text" $options
        done
        [ "$drop" = 6 ] || continue
        for other in ${TEXTS-wikitext2 c4 self}; do
            case $other in
            wikitext2) spec="text:$data/wikitext2_train.txt.gz" ;;
            c4) spec="jsonl:$folder_of_texts/c4.jsonl:text" ;;
            *) spec=$other ;;
            esac
            train_and_measure "$name" "full-$other" "$spec" --train full
        done
    done
done
how="DROPS=\"${DROPS:-6 9}\" STARTS=\"${STARTS:-sglp search+linear best}\" TEXTS=\"${TEXTS-wikitext2 c4 self}\" TOKENS=${TOKENS:-20k} WINDOWS=${WINDOWS:-302} LIMIT=${LIMIT:-100}"
"$bin/python" tools/healing_page.py "$output" docs/healing.md "$how"
