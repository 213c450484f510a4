#!/usr/bin/env bash
# Makes docs/leaderboard.md: every preset and criterion on SmolLM2-135M-Instruct without 3, 6 and 9 of its 30 layers.
#
#   tools/leaderboard.sh DATA [OUTPUT]
#
# DATA holds wikitext2_train.txt.gz, wikitext2_test.txt.gz, wikitext2_valid.txt.gz, c4_sample.jsonl.gz, alpaca_5k.jsonl.gz and the files
# that the suite offline reads. It takes many hours; OUTPUT (default: leaderboard-output) keeps what is finished, so that it can be
# interrupted and started again. DEPTHS and METHODS choose rows; the page keeps its other ones. WINDOWS and LIMIT
# are the windows of a text and the examples of a task.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: tools/leaderboard.sh DATA [OUTPUT]}
output=${2:-leaderboard-output}
bin=${SGLP_BIN:-.venv/bin}
model=$("$bin/python" tools/fetch_smollm2.py)
presets=paper,closed-form,fast,best
criteria=$("$bin/python" -m sglp_llm ls criteria --json | "$bin/python" -c 'import json, sys; print(*(row["name"] for row in json.load(sys.stdin)["criteria"]))')
single= repaired=
for name in $criteria; do
    [ "$name" = sglp ] || single+=,$name
    repaired+=,$name+linear
done
mkdir -p "$output"
"$bin/python" tools/calibration_texts.py "$data" "$output/texts"
for depth in ${DEPTHS:-6 9 3}; do
    "$bin/python" -m sglp_llm compare "$model" --criteria "${METHODS:-$presets$single$repaired}" --drops "$depth" --protect-first 4 --protect-last 2 \
        --calibration "jsonl:$output/texts/training.jsonl:text" --samples 64 --seq-len 256 --trial-samples 4 --dtype float32 \
        --eval "text:$data/wikitext2_test.txt.gz" --eval "jsonl:$data/c4_sample.jsonl.gz:text" --window 512 --max-windows "${WINDOWS:-302}" \
        --suite offline --suite generation_offline --data-dir "$data" --limit "${LIMIT:-100}" --measure-dtype bfloat16 \
        --measured "$output/measured" --output "$output/$depth" >/dev/null
    "$bin/python" tools/leaderboard_page.py "$output" docs/leaderboard.md
done
