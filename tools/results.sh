#!/usr/bin/env bash
# Makes docs/results.md, its plot and its CSV: every criterion on SmolLM2-135M-Instruct at 3, 6 and 9 of 30 layers.
#
#   tools/results.sh DATA [OUTPUT]
#
# DATA holds wikitext2_valid.txt.gz (calibration), wikitext2_test.txt.gz and c4_sample.jsonl.gz (perplexity: the whole half of WikiText-2,
# and the first documents of C4) and the files that eval/offline.yaml reads. It takes hours; it can be interrupted and started again, and
# OUTPUT (default: results-output) keeps what is finished. WINDOWS and LIMIT take less. The tables of
# tools/carry_over.sh DATA OUTPUT/carry-over are put on the same page when they are there.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: tools/results.sh DATA [OUTPUT]}
output=${2:-results-output}
bin=${SGLP_BIN:-.venv/bin}
criteria=sglp,gradnorm,taylor,magnitude,ppl,bi,angular,slp,cka_output,sleb,kl,reverse,random

"$bin/python" tools/calibration_texts.py "$data" "$output.texts"
"$bin/python" -m sglp_llm compare "$("$bin/python" tools/fetch_smollm2.py)" --recipe docs/results.yaml \
    --criteria "$criteria" --drops 3,6,9 --calibration "text:$data/wikitext2_valid.txt.gz" \
    --eval "text:$data/wikitext2_test.txt.gz" --eval "jsonl:$output.texts/c4_head.jsonl:text" --window 512 \
    --max-windows "${WINDOWS:-302}" --suite eval/offline.yaml --data-dir "$data" --limit "${LIMIT:-10}" --output "$output" >/dev/null
cp "$output/compare.svg" docs/results.svg
cp "$output/compare.csv" docs/results.csv
"$bin/python" tools/results_page.py results "$output/compare.json" docs/results.md "$output/carry-over"
