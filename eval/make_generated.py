"""Writes the examples of eval/generated.yaml: python eval/make_generated.py FOLDER. The same bytes at every run."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

EXAMPLES = 300

NOUNS = "key book door horse teacher picture letter road garden farmer window engine"
PLACES = "cabinet house brother river village table station forest office doctor"
LINKS = "near behind above beside"
ENDS = {
    ("is", "are"): ("very old", "quite expensive", "known to everyone", "not what we expected"),
    ("was", "were"): ("lost for years", "in the report", "blue", "the first to be noticed"),
    ("has", "have"): ("changed a lot", "been here since May", "a long history"),
    ("looks", "look"): ("fine today", "much larger now", "a little strange"),
}
WORDS = (
    "apple river stone cloud lamp chair bread horse green seven music paper sugar winter doctor yellow train bottle"
    " garden silver money orange finger island camera pencil"
)


def agreement(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Minimal pairs of subject-verb agreement, with a distracting noun of either number in between."""
    forms = [(verbs, end) for verbs, ends in ENDS.items() for end in ends]
    drawn = list(product(NOUNS.split(), LINKS.split(), PLACES.split(), forms, (0, 1), (0, 1)))
    for noun, link, place, (verbs, end), subject, other in draw.sample(drawn, EXAMPLES):
        start = f"The {noun}{'s' * subject} {link} the {place}{'s' * other}"
        yield {
            "sentence_good": f"{start} {verbs[subject]} {end}.",
            "sentence_bad": f"{start} {verbs[1 - subject]} {end}.",
            "misleading": subject != other,
        }


def arithmetic(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Sums of two numbers below 100; the wrong answers are off by one, by ten, or by both."""
    for first, second in draw.sample(list(product(range(10, 100), repeat=2)), EXAMPLES):
        right = first + second
        wrong = draw.sample([right + off for off in (-11, -10, -9, -1, 1, 9, 10, 11)], 3)
        choices = [str(number) for number in draw.sample([right, *wrong], 4)]
        yield {
            "question": f"2 + 3 = 5\n14 + 8 = 22\n{first} + {second} =",
            "choices": choices,
            "label": choices.index(str(right)),
        }


def copying(draw: random.Random) -> Iterator[dict[str, Any]]:
    """A row of words, repeated; the missing last word can only be copied."""
    for number in range(EXAMPLES):
        words = draw.sample(WORDS.split(), 4 + number % 5)
        row, last = " ".join(words), words[-1]
        yield {"prompt": f"{row}\n{row}\n{' '.join(words[:-1])}", "continuation": f" {last}"}


MAKERS: dict[str, Callable[[random.Random], Iterator[dict[str, Any]]]] = {
    "agreement": agreement,
    "arithmetic": arithmetic,
    "copying": copying,
}


def write_tasks(folder: Path) -> None:
    """Writes one JSONL file per task."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in MAKERS.items():
        rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in make(random.Random(f"sglp {name}")))
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write_tasks(parser.parse_args().folder)
