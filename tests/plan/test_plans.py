"""Plans: what is written is read back, a person's plan needs two keys, and every mistake has a message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglp_llm.errors import UserError
from sglp_llm.plan import load_plan, plan_from_indices, plan_to_dict, save_plan
from sglp_llm.plan.plans import KEYS, plan_from_dict
from sglp_llm.records import Footprint, ModelIdentity, PrunePlan, Segment, SimilarityMatrix

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def random_similarity(depth: int, seed: int, kernel: str) -> SimilarityMatrix:
    values = torch.rand(depth, depth, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return SimilarityMatrix(values, kernel)


def footprints(depth: int) -> st.SearchStrategy[Footprint]:
    count = st.integers(0, 10**12)
    each, limits = st.tuples(*[count] * depth), st.tuples(*[st.none() | count] * depth)
    return st.builds(Footprint, count, count, each, each, limits, st.none() | count)


@st.composite
def plans(draw: st.DrawFn) -> PrunePlan:
    depth = draw(st.integers(2, 40))
    removed = draw(st.sets(st.integers(0, depth - 1), min_size=1, max_size=depth - 1))
    cuts = sorted(draw(st.sets(st.integers(1, depth - 1), max_size=4)))
    segments = tuple(Segment(a, b) for a, b in zip([0, *cuts], [*cuts, depth], strict=True))
    return PrunePlan(
        num_layers=depth,
        kept=tuple(layer for layer in range(depth) if layer not in removed),
        source=draw(st.none() | st.builds(ModelIdentity, st.text(), st.text(), st.text())),
        revision=draw(st.none() | st.text()),
        segments=draw(st.sampled_from([(), segments])),
        scores=draw(st.dictionaries(st.text(), st.tuples(*[NUMBERS] * depth), max_size=2)),
        similarity=draw(st.none() | st.builds(random_similarity, st.just(depth), st.integers(0, 99), st.text())),
        footprint=draw(st.none() | footprints(depth)),
        budget=draw(st.sampled_from([{}, {"ratio": 0.25}, {"drop": 3}, {"target_params": 10**12}])),
        settings=draw(st.dictionaries(st.text(), PLAIN, max_size=3)),
        versions=draw(st.dictionaries(st.text(), st.text(), max_size=3)),
    )


@given(plan=plans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
def test_a_saved_plan_is_read_back_whole(plan: PrunePlan, tmp_path: Path) -> None:
    save_plan(plan, tmp_path / "sglp_plan.json")
    assert load_plan(tmp_path / "sglp_plan.json") == plan
    assert load_plan(str(tmp_path)) == plan


@given(plan=plans())
@settings(deadline=None)
def test_the_file_is_json_with_one_key_a_line(plan: PrunePlan) -> None:
    data = plan_to_dict(plan)
    assert tuple(data) == KEYS
    assert sorted([*data["kept"], *data["removed"]]) == list(range(plan.num_layers))
    assert plan_from_dict(json.loads(json.dumps(data))) == plan


def test_saved_plan_can_be_read_by_a_person(tmp_path: Path) -> None:
    plan = PrunePlan(4, (0, 3), scores={"bi": (1.0, 2.0, 3.0, 4.0)}, settings={"Ä": "\n"})
    save_plan(plan, tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("{", "}", 2 + len(KEYS))
    assert '  "kept": [0, 3],' in lines
    assert '  "scores": {"bi": [1.0, 2.0, 3.0, 4.0]},' in lines


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"num_layers": 4, "removed": [2, 1]}', (0, 3)),
        ('{"num_layers": 4, "kept": [3, 0]}', (0, 3)),
        ('{"num_layers": 4, "kept": [0, 3], "removed": [1, 2]}', (0, 3)),
        ('{"num_layers": 2, "removed": [0], "source": null, "segments": null, "scores": null, "budget": null}', (1,)),
    ],
)
def test_a_persons_plan(text: str, kept: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(text)
    plan = load_plan(tmp_path / "mine.json")
    assert plan == PrunePlan(plan.num_layers, kept)
    assert sorted((*plan.kept, *plan.removed)) == list(range(plan.num_layers))


def test_plans_with_other_similarities_are_different() -> None:
    one, same, other = (PrunePlan(4, (0,), similarity=random_similarity(4, seed, "cosine")) for seed in (0, 0, 1))
    assert one == same
    assert one not in (other, PrunePlan(4, (0,), similarity=random_similarity(4, 0, "linear")), PrunePlan(4, (0,)))


def test_a_file_with_a_byte_order_mark_as_some_editors_write_it(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"num_layers": 2, "removed": [0]}', encoding="utf-8-sig")
    assert load_plan(tmp_path / "mine.json") == PrunePlan(2, (1,))


SOURCE = {"name": "a", "model_type": "llama", "fingerprint": "sha256:0"}
FOOTPRINT = {"itemsize": 2, "outside": 1, "positions": None}
FOOTPRINT |= {"layers": [1] * 4, "cached": [1] * 4, "cached_tokens": [None] * 4}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"removd": [1]}, "unknown key 'removd'; did you mean 'removed'?"),
    ({"xyzzy": 1}, "unknown key 'xyzzy'. Known: budget, compensation, footprint, kept,"),
    ({"schema_version": 2}, "schema_version 2 is not 1"),
    ({"schema_version": None}, "schema_version None is not 1"),
    ({"schema_version": True}, "schema_version True is not 1"),
    ({"num_layers": None}, "num_layers must be a positive whole number, not None"),
    ({"num_layers": "4"}, "num_layers must be a positive whole number, not '4'"),
    ({"num_layers": 4.0}, "num_layers must be a positive whole number, not 4.0"),
    ({"num_layers": True}, "num_layers must be a positive whole number, not True"),
    ({"num_layers": 0}, "num_layers must be a positive whole number, not 0"),
    ({"removed": "1"}, "removed: expected a list of whole numbers, not '1'"),
    ({"removed": None}, "removed: expected a list of whole numbers, not None"),
    ({"removed": [1.0]}, "removed: expected a list of whole numbers, not [1.0]"),
    ({"removed": [True]}, "removed: expected a list of whole numbers, not [True]"),
    ({"removed": [4]}, "removed: layer 4 is not in 0..3"),
    ({"removed": [-1]}, "removed: layer -1 is not in 0..3"),
    ({"removed": [1, 1]}, "removed: a layer stands in the list twice: [1, 1]"),
    ({"removed": []}, "no layer would be removed"),
    ({"removed": [0, 1, 2, 3]}, "all 4 layers would be removed; at least one must stay"),
    ({"kept": [0, 1]}, "'kept' and 'removed' contradict each other; give one of them"),
    ({"source": "gpt2"}, "source must be an object with name, model_type and fingerprint, not str"),
    ({"source": {"name": "a"}}, "source must have exactly the texts name, model_type and fingerprint"),
    ({"source": {**SOURCE, "fingerprint": None}}, "source must have exactly the texts"),
    ({"source": {**SOURCE, "more": ""}}, "source must have exactly the texts"),
    ({"revision": 3}, "revision must be a text, not int"),
    ({"segments": {}}, "segments must be a list of [start, stop] pairs, not dict"),
    ({"segments": [[0, 2, 4]]}, "segments must be a list of [start, stop] pairs, half open"),
    ({"segments": [0, 4]}, "segments must be a list of [start, stop] pairs, half open"),
    ({"segments": [[0, 4.0]]}, "segments must be a list of [start, stop] pairs, half open"),
    ({"segments": [[0, 2], [3, 4]]}, "segments must cover 0..4 without gaps, in order"),
    ({"segments": [[0, 3]]}, "segments must cover 0..4 without gaps, in order"),
    ({"segments": [[2, 4], [0, 2]]}, "segments must cover 0..4 without gaps, in order"),
    ({"segments": [[0, 2], [2, 2], [2, 4]]}, "segments must cover 0..4 without gaps, in order"),
    ({"scores": [1]}, "scores must be an object of lists, not list"),
    ({"scores": {"bi": [1, 2, 3]}}, "scores.bi must be a list of 4 numbers"),
    ({"scores": {"bi": [1, 2, 3, "4"]}}, "scores.bi must be a list of 4 numbers"),
    ({"scores": {"bi": 4}}, "scores.bi must be a list of 4 numbers"),
    ({"similarity": [[1.0]]}, "similarity must be an object with kernel and values, not list"),
    ({"similarity": {"values": []}}, "similarity must have exactly the text kernel and the rows values"),
    ({"similarity": {"kernel": 1, "values": []}}, "similarity must have exactly the text kernel and the rows values"),
    ({"similarity": {"kernel": "", "values": [[1] * 4] * 3}}, "similarity.values must be 4 lists of 4 numbers"),
    ({"similarity": {"kernel": "", "values": [[1] * 3] * 4}}, "similarity.values must be 4 lists of 4 numbers"),
    ({"similarity": {"kernel": "", "values": [["1"] * 4] * 4}}, "similarity.values must be 4 lists of 4 numbers"),
    ({"footprint": 1}, "footprint must be an object with itemsize, outside, layers"),
    ({"footprint": {**FOOTPRINT, "more": 1}}, "footprint must have exactly itemsize, outside, layers"),
    ({"footprint": {**FOOTPRINT, "itemsize": 2.0}}, "footprint.itemsize must be a whole number, not 2.0"),
    ({"footprint": {**FOOTPRINT, "outside": None}}, "footprint.outside must be a whole number, not None"),
    ({"footprint": {**FOOTPRINT, "positions": -1}}, "footprint.positions must be a whole number, not -1"),
    ({"footprint": {**FOOTPRINT, "layers": [1] * 3}}, "footprint.layers must be a list of 4 whole numbers"),
    ({"footprint": {**FOOTPRINT, "cached": [1, 1, 1, None]}}, "footprint.cached must be a list of 4 whole numbers"),
    ({"footprint": {**FOOTPRINT, "cached_tokens": 4}}, "footprint.cached_tokens must be a list of 4 whole numbers"),
    ({"budget": [1]}, "budget must be an object, not list"),
    ({"budget": 0}, "budget must be an object, not int"),
    ({"settings": "x"}, "settings must be an object, not str"),
    ({"versions": ""}, "versions must be an object, not str"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=str)
def test_every_mistake_has_a_message_that_names_the_file(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"num_layers": 4, "removed": [2]}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(good))
    load_plan(file)
    file.write_text(json.dumps({**good, **change}))
    with pytest.raises(UserError) as raised:
        load_plan(file)
    assert str(raised.value).startswith(f"{file}: {message}")
    assert "\n" not in str(raised.value)


def test_neither_kept_nor_removed() -> None:
    with pytest.raises(UserError, match="plan: a plan needs one of 'kept' and 'removed'"):
        plan_from_dict({"num_layers": 4})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a JSON file"),
        (b"{", "not a JSON file"),
        (b"\xff\xfe", "not a JSON file"),
        (b"[1]", "the plan must be a JSON object, not list"),
        (b"null", "the plan must be a JSON object, not NoneType"),
        (b"[" * 100_000, "not a JSON file (nested too deeply)"),
        (b'{"num_layers": ' + b"1" * 5000 + b"}", "not a JSON file"),
        (
            b'{"num_layers": 2, "removed": [0], "scores": {"bi": [1, 1' + b"0" * 400 + b"]}}",
            "not a JSON file (a number of more",
        ),
        (b'{"num_layers": 2, "removed": [0], "scores": {"bi": [NaN, 1]}}', "scores.bi must be a list of 2 numbers"),
    ],
)
def test_files_that_are_no_plans(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_plan(file)
    assert str(raised.value).startswith(f"{file}: {message}")


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "plan.json"):
        with pytest.raises(UserError, match="there is no such plan file"):
            load_plan(path)


def test_indices_make_a_plan_and_are_checked() -> None:
    assert plan_from_indices(5, (3, 1)).kept == (0, 2, 4)
    assert plan_from_indices(5, iter([0])).removed == (0,)
    for removed, message in (([5], "layer 5 is not in 0..4"), ([1, 1], "twice"), ([], "no layer"), (range(5), "all 5")):
        with pytest.raises(UserError, match=message):
            plan_from_indices(5, removed)
