#!/usr/bin/env bash
# Makes docs/results.md, its plot and its CSV: every criterion on SmolLM2-135M-Instruct at 3, 6 and 9 of 30 layers.
#
#   tools/results.sh DATA [OUTPUT]
#
# DATA holds wikitext2_valid.txt.gz (calibration), wikitext2_test.txt.gz and c4_sample.jsonl.gz (perplexity). It can be interrupted and
# started again; OUTPUT (default: results-output) keeps what is finished. WINDOWS=302 scores the whole half of WikiText-2, in hours.
# The tables of tools/carry_over.sh DATA OUTPUT/carry-over are put on the same page when they are there.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: tools/results.sh DATA [OUTPUT]}
output=${2:-results-output}
bin=${SGLP_BIN:-.venv/bin}
criteria=sglp,gradnorm,taylor,magnitude,ppl,bi,angular,slp,cka_output,sleb,kl,reverse,random

"$bin/python" -m sglp_llm compare "$("$bin/python" tools/fetch_smollm2.py)" --recipe docs/results.yaml \
    --criteria "$criteria" --drops 3,6,9 --calibration "text:$data/wikitext2_valid.txt.gz" \
    --eval "text:$data/wikitext2_test.txt.gz" --eval "jsonl:$data/c4_sample.jsonl.gz:text" \
    --window 512 --max-windows "${WINDOWS:-12}" --output "$output" "${@:3}"
cp "$output/compare.svg" docs/results.svg
cp "$output/compare.csv" docs/results.csv
"$bin/python" tools/results_page.py results "$output/compare.md" docs/results.md "$output/carry-over"
