#!/usr/bin/env bash
# Makes the second half of docs/results.md: does a choice of layers carry over to other texts, sizes and draws of the calibration
# set, and what does each part of a method contribute? All on SmolLM2-135M-Instruct, most with 6 of 30 layers removed.
#
#   tools/carry_over.sh DATA [OUTPUT] [STUDY ...]
#
# DATA as for tools/results.sh, with alpaca_5k.jsonl.gz. STUDY: seeds texts tokens depths ablation readings; all by default. It can be
# interrupted and started again; what was measured is shared by all studies. tools/results.sh puts the tables on its page. WINDOWS are
# measured on of each text (32), half as many in the three studies that compare calibration sets.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: tools/carry_over.sh DATA [OUTPUT] [STUDY ...]}
output=${2:-results-output/carry-over}
studies=${*:3}
bin=${SGLP_BIN:-.venv/bin}
single=sglp,gradnorm,gate,taylor,bi,angular,ppl
wikitext="text:$data/wikitext2_valid.txt.gz"
instructions=(--eval "jsonl:$output/texts/alpaca_rest.jsonl:text")
windows=${WINDOWS:-32}
model=$("$bin/python" tools/fetch_smollm2.py)
"$bin/python" tools/calibration_texts.py "$data" "$output/texts"

# run NAME CRITERIA [options]: into OUTPUT/NAME.
run() {
    "$bin/python" -m sglp_llm compare "$model" --recipe docs/results.yaml --protect-first 4 --protect-last 2 \
        --eval "text:$data/wikitext2_test.txt.gz" --eval "jsonl:$data/c4_sample.jsonl.gz:text" --window 512 \
        --max-windows "$windows" --measured "$output/measured" --output "$output/$1" --criteria "$2" "${@:3}" >/dev/null
}

seeds() {
    local windows=$((windows / 2))
    run seeds "$single,sglp-search,angular+linear" --drops 6 --calibration "$wikitext" --seeds 0,1,2,3,4
}

# text NAME CALIBRATION
text() {
    local windows=$((windows / 2))
    run "text-$1" "$single,sglp-search,angular+linear" --drops 6 --calibration "$2" "${instructions[@]}"
}

texts() {
    text wikitext "$wikitext"
    for name in c4 alpaca; do text "$name" "jsonl:$output/texts/$name.jsonl:text"; done
}

tokens() {
    text wikitext "$wikitext"
    local windows=$((windows / 2))
    for samples in 128 512; do
        run "tokens-$samples" "$single,sglp-search,angular+linear" --drops 6 --calibration "$wikitext" --samples "$samples"
    done
}

depths() { run depths "$single,sglp-search,angular+linear,best" --drops 3,6,9,12 --calibration "$wikitext"; }

ablation() {
    local methods=""
    for choice in gradnorm sglp sglp-search; do methods+="$choice,$choice+linear,$choice+learned,"; done
    run ablation "$methods" --drops 6 --calibration "$wikitext"
}

readings() {
    local of=(--drops 6 --calibration "$wikitext")
    run readings "$single" "${of[@]}"
    for norm in tensors relative; do
        run "reading-$norm" gradnorm,sglp "${of[@]}" --option "gradnorm.norm=$norm"
    done
    for best in largest smallest; do
        run "reading-without-$best" gradnorm_without "${of[@]}" --option "gradnorm_without.best=$best"
        run "reading-without-$best-segments" gradnorm_without "${of[@]}" --option "gradnorm_without.best=$best" --segments
    done
    run reading-gate-1 gate "${of[@]}" --option gate.order=1
    for order in 1 2; do
        run "reading-gate-$order-segments" gate "${of[@]}" --option "gate.order=$order" --segments
    done
}

for study in ${studies:-seeds texts tokens depths ablation readings}; do "$study"; done
