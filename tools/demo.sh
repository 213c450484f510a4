#!/usr/bin/env bash
# Removes a fifth of the layers of a trained 30-layer Llama, without a model hub, and measures perplexity before and after.
set -euo pipefail
bin=${SGLP_BIN:-.venv/bin}
output=${OUTPUT:-demo-output}

run() {
    printf '\n$ sglp-llm %s\n' "$*"
    "$bin/sglp-llm" "$@"
}

model=$("$bin/python" tools/fetch_smollm2.py)
run eval "$model" --data pydoc --window 512
run prune "$model" --ratio 0.2 --calibration pydoc --samples 32 --seq-len 256 --output "$output" --overwrite
run eval "$output" --data pydoc --window 512

printf '\nThe result is an ordinary checkpoint:\n'
"$bin/python" - "$output" <<'PYTHON'
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer("A function in Python is defined with", return_tensors="pt")
text = tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
print(f"{type(model).__name__} with {model.config.num_hidden_layers} layers says: {text!r}")
PYTHON
printf '\nWhat was removed and why, for a browser: %s/report.html\n' "$output"
