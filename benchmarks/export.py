"""Wall time of an export over ``cp`` of the bytes that it wrote, and the exporting process's peak memory.

A random bfloat16 Llama of 2.6 GB in four shards loses a quarter of its layers. Export (in process, without the reload check) and
``cp -r`` of its result alternate; what is dirty is flushed before each. The first pair warms the page cache and is not counted.

    python benchmarks/export.py [--pairs 7] [--folder WHERE]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

from machine import describe

from sglp_llm.plan import plan_from_indices

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 24, 2048, 5632, 32000
REMOVED = (9, 11, 12, 14, 17, 20)


def tensors() -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's tensors."""
    result: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        result += [(f"{prefix}.self_attn.{name}_proj.weight", (HIDDEN, HIDDEN)) for name in "qkvo"]
        result += [(f"{prefix}.mlp.{name}_proj.weight", (INTERMEDIATE, HIDDEN)) for name in ("gate", "up")]
        result += [(f"{prefix}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE))]
        result += [(f"{prefix}.{name}_layernorm.weight", (HIDDEN,)) for name in ("input", "post_attention")]
    return [*result, ("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (VOCABULARY, HIDDEN))]


def write_checkpoint(folder: Path, shards: int = 4) -> int:
    """Writes a checkpoint of random bytes with those tensors; returns their number of bytes."""
    noise = os.urandom(1 << 24)
    everything, weight_map, total = tensors(), {}, 0
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        header, size = {}, 0
        for tensor, shape in everything[number * len(everything) // shards : (number + 1) * len(everything) // shards]:
            nbytes = 2
            for length in shape:
                nbytes *= length
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, size + nbytes]}
            weight_map[tensor], size = name, size + nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, size, len(noise)):
                file.write(noise[: min(len(noise), size - start)])
        total += size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "dtype": "bfloat16"}
    config |= {"intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": 16}
    config |= {"num_key_value_heads": 16, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config))
    return total


def export_seconds(source: Path, output: Path) -> float:
    """What `sglp-llm prune --plan --no-verify` does after its imports."""
    from sglp_llm import prune

    os.sync()
    start = time.perf_counter()
    prune(source, output, plan=plan_from_indices(LAYERS, REMOVED), verify=False)
    return time.perf_counter() - start


def cp_seconds(source: Path, output: Path) -> float:
    """``cp -r``."""
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, output], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="Where to write; default: the system's temporary folder.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, pruned, copied = (Path(name) / part for part in ("source", "pruned", "copied"))
        source.mkdir()
        total = write_checkpoint(source)
        print(f"{describe()}; {total / 1e9:.2f} GB in 4 shards, {len(REMOVED)} of {LAYERS} layers removed")
        ratios = []
        for pair in range(options.pairs + 1):
            export = export_seconds(source, pruned)
            copy = cp_seconds(pruned, copied)
            if pair > 0:
                ratios.append(export / copy)
                print(f"pair {pair}: export {export:.2f} s, cp {copy:.2f} s, ratio {ratios[-1]:.2f}", flush=True)
            written = sum(file.stat().st_size for file in pruned.iterdir())
            shutil.rmtree(pruned)
            shutil.rmtree(copied)
    print(
        f"export / cp of {written / 1e9:.2f} GB: median {median(ratios):.2f}, {min(ratios):.2f}..{max(ratios):.2f} (target 1.5)"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(f"peak resident memory of the export process: {peak:.0f} MB (target 700)")


if __name__ == "__main__":
    main()
