#!/usr/bin/env bash
# Removes a fifth of the layers of a trained 30-layer Llama, without a model hub; perplexity and a sentence before and after.
set -euo pipefail
bin=${SGLP_BIN:-.venv/bin}
output=${OUTPUT:-demo-output}

run() {
    printf '\n$ sglp-llm %s\n' "$*"
    "$bin/sglp-llm" "$@"
}

model=$("$bin/python" tools/fetch_smollm2.py)
run prune "$model" --ratio 0.2 --calibration pydoc --samples 32 --seq-len 256 --output "$output" --overwrite
run eval "$output" --data pydoc --window 512 --record

printf '\nThe result is an ordinary checkpoint:\n'
TQDM_DISABLE=1 "$bin/python" - "$model" "$output" <<'PYTHON'
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()
original = Path(sys.argv[1])
for folder, options in ((original.parent, {"gguf_file": original.name}), (sys.argv[2], {})):
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    prompt = tokenizer("A function in Python is defined with", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
    print(f"{model.config.num_hidden_layers} layers: {text!r}")
PYTHON
printf '\nWhat was removed and why, for a browser: %s/report.html\n' "$output"
