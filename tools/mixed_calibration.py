"""Mixes a text of WikiText's layout and the end of a C4 sample into one JSONL file to calibrate on.

    python tools/mixed_calibration.py DATA OUTPUT.jsonl

Of C4 only documents from number 1000 on are taken: the ones before are what perplexity is measured on.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path

FIRST_DOCUMENT = 1000


def main() -> None:
    data, output = map(Path, sys.argv[1:])
    with gzip.open(data / "wikitext2_valid.txt.gz", "rt", encoding="utf-8") as file:
        articles = re.split(r"\n(?= = [^=].*[^=] = \n)", file.read())
    with gzip.open(data / "c4_sample.jsonl.gz", "rt", encoding="utf-8") as file:
        passages = [json.loads(line)["text"] for line in file][FIRST_DOCUMENT:]
    with output.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in [*articles, *passages] if text.strip())
    print(f"{output}: {len(articles)} articles, {len(passages)} passages")


if __name__ == "__main__":
    main()
