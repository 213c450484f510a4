"""Writes the examples of eval/generated.yaml and eval/generation_offline.yaml: python eval/make_generated.py FOLDER.

The same bytes at every run. One script for both, so that one folder holds what either needs.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from itertools import pairwise, product
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

ORDERS = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April May June July August September October November December",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen",
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    " ".join(map(str, range(10, 60))),
)
OPPOSITES = (
    "hot cold,big small,up down,left right,day night,black white,open closed,good bad,old new,fast slow,high low,happy sad,"
    "rich poor,long short,hard soft,light dark,full empty,first last,early late,true false,north south,east west,win lose,"
    "love hate,inside outside,buy sell,push pull,strong weak,wet dry,begin end"
)
CAPITALS = (
    "France Paris,Italy Rome,Spain Madrid,Germany Berlin,Japan Tokyo,China Beijing,Russia Moscow,Egypt Cairo,Greece Athens,"
    "Portugal Lisbon,Poland Warsaw,Austria Vienna,Sweden Stockholm,Norway Oslo,Denmark Copenhagen,Finland Helsinki,"
    "Ireland Dublin,Hungary Budapest,Cuba Havana,Peru Lima,England London,Canada Ottawa,Turkey Ankara,Belgium Brussels"
)
PLURALS = (
    "cat cats,dog dogs,book books,car cars,box boxes,city cities,child children,man men,woman women,foot feet,tooth teeth,"
    "mouse mice,leaf leaves,knife knives,baby babies,church churches,tree trees,bus buses,wolf wolves,party parties"
)

PEOPLE = (
    "a young doctor,an old farmer,my sister,the new teacher,two children,a famous painter,the king,a tired soldier,"
    "our neighbour,a scientist"
)
SCENES = (
    "in a small village,near the sea,on the way home,at the end of the war,in a large city,on a cold morning,"
    "during the summer,in the middle of the forest"
)
OPENINGS = (
    "Once upon a time, {who} {where} found",
    "Last year, {who} {where} decided to",
    "The story begins with {who} {where}, who",
    "Nobody knew why {who} {where} had",
    "This is what {who} {where} said:",
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


def sums(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Sums of two numbers from 10 to 49, after four of them with their answers."""
    pairs = list(product(range(10, 50), repeat=2))
    for _ in range(EXAMPLES):
        *shots, (first, second) = draw.sample(pairs, 5)
        shown = "".join(f"{one} + {other} = {one + other}\n" for one, other in shots)
        yield {"prompt": f"{shown}{first} + {second} =", "answer": str(first + second)}


def copies(draw: random.Random) -> Iterator[dict[str, Any]]:
    """A row of 2 to 6 words that is to be written again, all of it; four rows of 4 words before show how."""
    for number in range(EXAMPLES):
        *shots, asked = (" ".join(draw.sample(WORDS.split(), length)) for length in (4, 4, 4, 4, 2 + number % 5))
        shown = "".join(f"{shot}: {shot}\n" for shot in shots)
        yield {"prompt": f"{shown}{asked}:", "answer": asked}


def facts(draw: random.Random) -> Iterator[dict[str, Any]]:
    """What comes next, opposites, capitals and plurals, in turns: the end of a short line, after four lines of its kind."""
    kinds = [
        ("After {} comes {}", [pair for order in ORDERS for pair in pairwise(order.split())]),
        ("The opposite of {} is {}", _pairs(OPPOSITES)),
        ("The capital of {} is {}", _pairs(CAPITALS)),
        ("one {}, two {}", _pairs(PLURALS)),
        ("{} in capital letters: {}", [(word, word.upper()) for word in WORDS.split()]),
    ]
    for number in range(EXAMPLES):
        line, pairs = kinds[number % len(kinds)]
        *shots, (asked, answer) = draw.sample(pairs, 5)
        shown = "".join(line.format(*shot) + "\n" for shot in shots)
        yield {"prompt": shown + line.format(asked, "").rstrip(), "answer": answer}


def openings(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Beginnings of stories that can go on in any way."""
    drawn = list(product(OPENINGS, PEOPLE.split(","), SCENES.split(",")))
    for opening, who, where in draw.sample(drawn, EXAMPLES):
        yield {"prompt": opening.format(who=who, where=where)}


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(first, second) for first, second in (pair.split() for pair in text.split(","))]


MAKERS: dict[str, Callable[[random.Random], Iterator[dict[str, Any]]]] = {
    "agreement": agreement,
    "arithmetic": arithmetic,
    "copying": copying,
    "generation_sums": sums,
    "generation_copy": copies,
    "generation_facts": facts,
    "generation_open": openings,
}


def write_tasks(folder: Path) -> None:
    """Writes one JSONL file per task."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in MAKERS.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in make(random.Random(f"sglp {name}")))
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write_tasks(parser.parse_args().folder)
