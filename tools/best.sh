#!/usr/bin/env bash
# Makes docs/best.md: the presets against single criteria on SmolLM2-135M-Instruct, 6 and 9 of 30 layers removed.
#
#   tools/best.sh DATA [OUTPUT]
#
# DATA holds wikitext2_valid.txt.gz and c4_sample.jsonl.gz (calibration: a mixture of both), wikitext2_test.txt.gz, and the files that
# eval/offline.yaml reads. Perplexity is measured on the whole half of WikiText-2 and on as much of C4, in hours; WINDOWS and LIMIT
# take less. It can be interrupted and started again.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: tools/best.sh DATA [OUTPUT]}
output=${2:-best-output}
bin=${SGLP_BIN:-.venv/bin}
"$bin/python" tools/calibration_texts.py "$data" "$output.texts"

# run DROPS [options of compare]
run() {
    "$bin/python" -m sglp_llm compare "$("$bin/python" tools/fetch_smollm2.py)" --recipe docs/results.yaml --samples 256 \
        --protect-first 4 --protect-last 2 --criteria angular,bi,taylor,ppl,sleb,kl,sglp-search,best --drops "$1" \
        --calibration "jsonl:$output.texts/mixed.jsonl:text" \
        --eval "text:$data/wikitext2_test.txt.gz" --eval "jsonl:$data/c4_sample.jsonl.gz:text" \
        --window 512 --max-windows "${WINDOWS:-302}" --output "$output" "${@:2}" >/dev/null
}

run 6 --suite eval/offline.yaml --data-dir "$data" --limit "${LIMIT:-100}"
cp "$output/compare.json" "$output/tasks.json"
run 6,9
"$bin/python" tools/results_page.py best "$output/compare.md" docs/best.md "$output/tasks.json"
