"""A teacher that is larger than what training takes: its logits are stored layer by layer, and the student learns from disk.

A random float32 Llama of 4.23 GB is the teacher; the student has a quarter of its decoder layers and learns through LoRA. The
peak is that of the whole command's process (`ru_maxrss`).

    python benchmarks/healing.py [--tokens 2048] [--seq-len 128] [--folder WHERE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from machine import describe
from random_llama import write_llama
from streamed import GB, SHAPE, fetch, peak_of

from sglp_llm.models.opened import OpenedModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="Where to write; default: the system's temporary folder.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        source, student, scratch = folder / "source", folder / "student", folder / "scratch"
        source.mkdir()
        scratch.mkdir()
        total = write_llama(source, SHAPE)
        OpenedModel(str(fetch())).tokenizer.save_pretrained(source)
        kept = SHAPE.layers // 4
        plan = folder / "plan.json"
        plan.write_text(json.dumps({"num_layers": SHAPE.layers, "kept": [*range(kept - 1), SHAPE.layers - 1]}))
        peak_of(
            ["prune", str(source), "--plan", str(plan), "--output", str(student), "--no-verify", "--engine", "streamed"]
        )
        size = sum(file.stat().st_size for file in student.glob("*.safetensors"))
        arguments = ["heal", str(student), "--output", str(folder / "healed"), "--train", "lora", "--data", "pydoc"]
        arguments += ["--tokens", str(options.tokens), "--seq-len", str(options.seq_len), "--no-verify"]
        arguments += ["--store-teacher", "--engine", "streamed", "--scratch", str(scratch)]
        peak, seconds = peak_of(arguments)
        print(
            f"{describe()}; teacher {total / GB:.2f} GB, student {size / GB:.2f} GB, LoRA, {options.tokens} tokens: "
            f"peak {peak:.2f} GB, {seconds:.0f} s"
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
