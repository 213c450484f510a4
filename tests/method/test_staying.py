"""Choices among layers some of which must stay, against every set and every order of removals."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglp_llm.errors import UserError
from sglp_llm.method.selection import check_budget, layers_to_remove, lowest_scores, removable_layers
from sglp_llm.method.staying import FREE, Staying, staying_from
from sglp_llm.records import Budget, Segment

DEPTH = 7


@st.composite
def limits(draw: st.DrawFn, needs: bool = True) -> Staying:
    always = dict.fromkeys(draw(st.sets(st.sampled_from([0, DEPTH - 1]))), "pinned")
    groups = st.frozensets(st.integers(0, DEPTH - 1), min_size=1, max_size=4)
    found = draw(st.lists(groups, max_size=2))
    if len(found) == 2 and found[0] & found[1] not in (*found, frozenset()):  # no model has groups that overlap in part
        found[1] = found[1] - found[0]
    one_of = [(group, "kinds") for group in found]
    needed = {}
    if needs:  # a layer is needed by later ones, and by no others
        for layer in draw(st.sets(st.integers(0, DEPTH - 2), max_size=3)):
            readers = st.frozensets(st.integers(layer + 1, DEPTH - 1), min_size=1, max_size=3)
            needed[layer] = (draw(readers), "reads")
    return Staying(always, needed, one_of)


def is_allowed(staying: Staying, removed: Collection[int]) -> bool:
    kept = set(range(DEPTH)) - set(removed)
    return (
        set(staying.always) <= kept
        and all(layer in kept or not readers & kept for layer, (readers, _) in staying.needed.items())
        and all(group & kept for group, _ in staying.one_of)
    )


def allowed_sets(staying: Staying, n: int) -> list[tuple[int, ...]]:
    return [each for each in combinations(range(DEPTH), n) if is_allowed(staying, each)]


def orders(staying: Staying, n: int, removed: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Every order of n removals in which each layer can go after the ones before it."""
    if n == 0:
        return [removed]
    following = [x for x in range(DEPTH) if x not in removed and is_allowed(staying, (*removed, x))]
    return [order for layer in following for order in orders(staying, n - 1, (*removed, layer))]


WHOLE = [Segment(0, DEPTH)]
scores_of = st.lists(st.integers(0, 4).map(float), min_size=DEPTH, max_size=DEPTH)


@settings(deadline=None)
@given(staying=limits(needs=False), scores=scores_of, n=st.integers(1, DEPTH - 1))
def test_the_least_sum_of_all_sets_that_can_go(staying: Staying, scores: Sequence[float], n: int) -> None:
    sets = allowed_sets(staying, n)
    if not sets:
        with pytest.raises(UserError, match="can go"):
            layers_to_remove(Budget(drop=n), WHOLE, scores, staying=staying)
        with pytest.raises(UserError, match="at most"):
            check_budget(Budget(drop=n), DEPTH, staying=staying)
        return
    removed = layers_to_remove(Budget(drop=n), WHOLE, scores, staying=staying)
    assert removed in sets
    assert sum(scores[layer] for layer in removed) == min(sum(scores[layer] for layer in each) for each in sets)


@settings(deadline=None, max_examples=40)
@given(staying=limits(), scores=scores_of, n=st.integers(1, 4))
def test_the_first_of_all_orders_of_removals(staying: Staying, scores: Sequence[float], n: int) -> None:
    every = orders(staying, n)
    if not every:
        with pytest.raises(UserError):
            layers_to_remove(Budget(drop=n), WHOLE, scores, staying=staying)
        return
    first = min(every, key=lambda order: [(scores[layer], layer) for layer in order])
    try:
        assert layers_to_remove(Budget(drop=n), WHOLE, scores, staying=staying) == tuple(sorted(first))
    except UserError:  # the lowest scores lead to where no other can go
        assert staying.one_of
        assert staying.needed


@settings(deadline=None)
@given(staying=limits(), scores=scores_of, cut=st.integers(1, DEPTH - 1), n=st.integers(1, 5))
def test_inside_segments_too(staying: Staying, scores: Sequence[float], cut: int, n: int) -> None:
    segments = [Segment(0, cut), Segment(cut, DEPTH)]
    try:
        removed = layers_to_remove(Budget(drop=n), segments, scores, staying=staying)
    except UserError:
        return
    assert len(removed) == n
    assert is_allowed(staying, removed)
    assert all(set(segment.layers) - set(removed) for segment in segments)


@settings(deadline=None)
@given(staying=limits(), wanted=st.frozensets(st.integers(0, DEPTH - 1), max_size=DEPTH - 1))
def test_a_set_is_mended_to_one_of_the_same_size(staying: Staying, wanted: frozenset[int]) -> None:
    removable = removable_layers(DEPTH, staying=staying)
    mended = staying.mended(wanted, removable)
    assert bool(staying.broken_by(wanted)) != is_allowed(staying, wanted)
    if mended is None:
        assert not allowed_sets(staying, len(wanted)) or (staying.one_of and staying.needed)
        return
    assert tuple(sorted(mended)) in allowed_sets(staying, len(wanted))
    if any(frozenset(order) == wanted for order in orders(staying, len(wanted))):
        assert len(mended & wanted) >= 1 or not wanted
        assert not staying.needed or mended <= set(removable)


@settings(deadline=None)
@given(
    kinds=st.lists(st.sampled_from("ab"), min_size=DEPTH, max_size=DEPTH).map(tuple),
    staying=limits(needs=False),
    scores=scores_of,
    n=st.integers(1, DEPTH - 1),
)
def test_kept_layers_come_where_their_kind_is(
    kinds: tuple[str, ...], staying: Staying, scores: Sequence[float], n: int
) -> None:
    patterned = Staying(always=staying.always, pattern=(kinds, "by index"))
    fitting = [
        each
        for each in allowed_sets(Staying(always=staying.always), n)
        if [kinds[layer] for layer in range(DEPTH) if layer not in each] == list(kinds[: DEPTH - n])
    ]
    assert all(bool(patterned.broken_by(each)) == (each not in fitting) for each in combinations(range(DEPTH), n))
    assert staying_from(patterned.to_dict(), "the plan").to_dict() == patterned.to_dict()
    if not fitting:
        with pytest.raises(UserError, match="together"):
            patterned.least(n, scores, range(DEPTH))
        return
    removed = patterned.least(n, scores, range(DEPTH))
    assert removed == min(fitting, key=lambda each: (sum(scores[layer] for layer in each), each))
    if not patterned.always:  # then the last layers can always go
        assert layers_to_remove(Budget(drop=n), WHOLE, scores, staying=patterned) == removed


@given(staying=limits(), scores=scores_of)
def test_without_limits_nothing_changes_and_a_plan_holds_them(staying: Staying, scores: Sequence[float]) -> None:
    assert staying_from(staying.to_dict(), "the plan") == staying
    assert staying_from(None, "the plan") == FREE
    assert len(staying.lines) == len(staying.always) + len(staying.needed) + len(staying.one_of)
    n = 3
    assert lowest_scores(n, WHOLE, scores) == tuple(
        sorted(sorted(range(DEPTH), key=lambda layer: (scores[layer], layer))[:n])
    )


@pytest.mark.parametrize(
    "data", [3, {"always": 1}, {"needed": {"1": 2}}, {"one_of": [[1, 2, 3]]}, {"always": {"x": ""}}, {"pattern": 3}]
)
def test_other_data_is_refused(data: object) -> None:
    with pytest.raises(UserError, match="staying must hold"):
        staying_from(data, "the plan")
