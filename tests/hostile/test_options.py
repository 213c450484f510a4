"""Random mixes of command-line options with values that nobody should give."""

from __future__ import annotations

from pathlib import Path

from checkpoints import SMALL
from hostile import FUZZ, attempt, encoded, share, working_folder
from hypothesis import given, settings
from hypothesis import strategies as st

NUMBERS = [
    "",
    " ",
    "-1",
    "0",
    "1",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "9" * 400,
    "9" * 5000,
    "\u0663",
    "\u00b2",
    "1:2",
]
NAMES = [
    "/dev/zero",
    "/proc/self/environ",
    "/",
    ".",
    "..",
    "~",
    "x" * 5000,
    "\x1b[2J",
    "'",
    "{}",
    "[1]",
    "null",
    "a,b",
    ",",
]
FORMS = [
    "a=b",
    "a.b=c",
    "gradnorm.norm=1",
    "search.budget=-1",
    "angular.tokens=x",
    "text:",
    "jsonl::",
    "wikitext2:-1",
    "self:x",
]

ODD = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(NAMES),
    st.sampled_from([*FORMS, "text:/etc:0"]),
    st.text(max_size=6).filter(encoded),
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
)

FITTING = {
    "ratio": ["0.25", "0.5"],
    "drop": ["1", "5", "6"],
    "target-params": ["30k", "10M"],
    "target-memory": ["200KB", "1GB"],
    "context": ["8"],
    "criterion": ["bi", "random", "sglp", "angular", "magnitude", "reverse"],
    "also": ["bi", "cka_output", "taylor"],
    "samples": ["2", "3"],
    "seq-len": ["8", "16"],
    "seed": ["3"],
    "trial-samples": ["1"],
    "batch-size": ["1", "3"],
    "option": ["angular.tokens=all", "gradnorm.norm=layer"],
    "num-segments": ["2", "auto"],
    "segments-rule": ["paper", "auto"],
    "features": ["rows"],
    "min-drop": ["0.1"],
    "kernel": ["linear"],
    "protect-first": ["1"],
    "protect-last": ["1"],
    "compensate": ["none", "scale"],
    "dtype": ["float32", "bfloat16"],
    "max-shard-size": ["20KB"],
    "plan": ["2,4", "1"],
}
"""Options of prune with values that may do; the others get odd ones alone."""

ONLY_ODD = [
    "revision",
    "device-map",
    "scratch",
    "search-budget",
    "journal",
    "tokenizer",
    "recipe",
    "preset",
    "heal-recipe",
]
ONLY_ODD += ["heal-tokens", "target-latency", "engine", "calibration"]
FLAGS = ["--segments", "--no-segments", "--no-verify", "--overwrite", "--json", "--private", "--heal"]


@st.composite
def options(draw: st.DrawFn) -> list[str]:
    """One to four options, at most two of which are odd."""
    given_ = []
    names = draw(st.lists(st.sampled_from([*FITTING, *FITTING, *ONLY_ODD]), min_size=1, max_size=4, unique=True))
    odd = draw(st.integers(0, 2))
    for number, name in enumerate(names):
        value = draw(ODD if number < odd or name in ONLY_ODD else st.sampled_from(FITTING[name]))
        given_ += [f"--{name}={value}"]
    return given_ + draw(st.lists(st.sampled_from(FLAGS[:-1]), max_size=1)) + ["--no-heal"]


@settings(max_examples=share("options of prune"), **FUZZ)
@given(chosen=options(), verb=st.sampled_from(["prune", "prune", "prune", "prune", "plan-memory"]))
def test_prune(source: Path, chosen: list[str], verb: str) -> None:
    with working_folder() as place:
        output = place / "out"
        names = " ".join(chosen)
        text = () if "--calibration" in names else SMALL[:2]
        size = [
            word for name, word in (("--samples", "--samples=2"), ("--seq-len", "--seq-len=8")) if name not in names
        ]
        if verb == "plan-memory":
            attempt("plan-memory", source, *chosen, *size, inputs=source)
            return
        engine = () if "--engine" in names else ("--engine", "resident")
        named = [Path(word.partition("=")[2]) for word in chosen if word.startswith("--journal=")]
        journal = place.joinpath(*named[0].parts[:1]) if named else None
        options_ = (*chosen, *size, *text, *engine, "--output", output)
        attempt("prune", source, *options_, inputs=source, output=output, journal=journal)


OTHER_VERBS = {
    "eval": [
        "data",
        "window",
        "max-windows",
        "suite",
        "limit",
        "data-dir",
        "baseline",
        "batch-size",
        "dtype",
        "engine",
    ],
    "replan": [
        "ratio",
        "drop",
        "criterion",
        "num-segments",
        "features",
        "min-drop",
        "protect-first",
        "target-params",
        "context",
    ],
    "bench": ["baseline", "prompt-len", "new-tokens", "batch", "repeats", "dtype", "revision"],
    "compare": [
        "criteria",
        "ratios",
        "drops",
        "calibration",
        "samples",
        "seq-len",
        "eval",
        "window",
        "seeds",
        "option",
    ],
    "heal": ["data", "tokens", "teacher", "recipe", "train", "alpha", "top-k", "on-policy", "learning-rate", "minutes"],
    "export": ["to"],
    "report": ["json"],
    "push": ["revision", "message"],
    "ls": ["json"],
    "nothing": ["a"],
}
WRITING = ("compare", "heal")
"""Verbs with an output; they get one odd option at least, and no work to do."""


@settings(max_examples=share("options of other verbs"), **FUZZ)
@given(data=st.data(), verb=st.sampled_from(sorted(OTHER_VERBS)))
def test_other_verbs(source: Path, data: st.DataObject, verb: str) -> None:
    names = data.draw(st.lists(st.sampled_from(OTHER_VERBS[verb]), min_size=1, max_size=3, unique=True))
    words = [f"--{name}={data.draw(ODD)}" for name in names]
    words += data.draw(st.lists(ODD.filter(lambda word: not word.startswith("-")), max_size=1))
    model = [str(source)] if verb != "ls" and data.draw(st.booleans()) else []
    with working_folder() as place:
        output = place / "out"
        written = ["-o", str(output)] if verb in WRITING else []
        attempt(verb, *model, *words, *written, inputs=source, output=output if written else None)
        assert set(place.iterdir()) <= {output}
