"""How much of a text is repeated: the metric of open.yaml. Beside it, so that lm-eval finds it wherever the folder lies."""

from __future__ import annotations

import re
from collections.abc import Sequence

LENGTH = 4
TOKEN = re.compile(r"\w+|[^\w\s]")


def repetition(references: Sequence[str], predictions: Sequence[str]) -> float:
    """The mean share of repeated 4-grams, 1 - distinct / all: seq-rep-4 of Welleck et al. 2020 (arXiv:1908.04319).

    Theirs are n-grams of the model's tokens. Here a token is a word or any other character that is not white space, so that
    models with different tokenizers can be compared. A text without a single 4-gram, such as white space or one word without
    an end, counts as repeated altogether: it was asked for 64 tokens.

    Args:
        references: What lm-eval gives every metric; unused.
        predictions: Texts.

    Returns:
        From 0, where no 4-gram occurs twice, to nearly 1, where one goes round and round.
    """
    return sum(map(_repeated, predictions)) / len(predictions)


def _repeated(text: str) -> float:
    tokens = TOKEN.findall(text)
    grams = [tuple(tokens[start : start + LENGTH]) for start in range(len(tokens) - LENGTH + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 1.0
