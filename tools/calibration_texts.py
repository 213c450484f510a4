"""Writes the calibration and evaluation texts of comparisons that have to divide or mix samples of data sets.

    python tools/calibration_texts.py DATA FOLDER

``c4.jsonl`` is C4 from document 1000 on; perplexity is measured on the documents before. ``c4_head.jsonl`` has the first 30 of
these, for measurements of many models. ``mixed.jsonl`` is ``c4.jsonl`` and the articles of the WikiText-2 validation text.
``training.jsonl`` has the passages of ``c4.jsonl`` and as many paragraphs of the WikiText-2 training text, for training.
``alpaca.jsonl`` has the first 4000 instructions with their answers, ``alpaca_rest.jsonl`` the others, for measurements.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path

FIRST_DOCUMENT = 1000
HEAD = 30
INSTRUCTIONS = 4000
PARAGRAPH = 600
"""Least characters of a WikiText-2 paragraph that is trained on; a passage of C4 has about 1200."""


def main() -> None:
    data, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(data / "wikitext2_valid.txt.gz", "rt", encoding="utf-8") as file:
        articles = re.split(r"\n(?= = [^=].*[^=] = \n)", file.read())
    with gzip.open(data / "wikitext2_train.txt.gz", "rt", encoding="utf-8") as file:
        paragraphs = [line.strip() for line in file if len(line) > PARAGRAPH]
    documents = [row["text"] for row in rows(data / "c4_sample.jsonl.gz")]
    passages = documents[FIRST_DOCUMENT:]
    answered = [
        "\n".join(row[field] for field in ("instruction", "input", "output") if row[field])
        for row in rows(data / "alpaca_5k.jsonl.gz")
    ]
    write(folder / "mixed.jsonl", [*articles, *passages])
    write(folder / "c4.jsonl", passages)
    drawn = random.Random(0).sample(paragraphs, len(passages))
    write(folder / "training.jsonl", [text for pair in zip(drawn, passages, strict=True) for text in pair])
    write(folder / "c4_head.jsonl", documents[:HEAD])
    write(folder / "alpaca.jsonl", answered[:INSTRUCTIONS])
    write(folder / "alpaca_rest.jsonl", answered[INSTRUCTIONS:])


def rows(file: Path) -> list[dict[str, str]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(target: Path, texts: Iterable[str]) -> None:
    kept = [text for text in texts if text.strip()]
    with target.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in kept)
    print(f"{target}: {len(kept)} texts")


if __name__ == "__main__":
    main()
