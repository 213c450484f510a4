"""Guided search for the set of layers whose removal changes the predictions least: segments and angular distances propose sets,
trials decide."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglp_llm.calibration import Parts, split
from sglp_llm.criteria.angular import Angular
from sglp_llm.criteria.base import SetCriterion
from sglp_llm.engine import Need, PassSettings, run_pass
from sglp_llm.engine.representations import CKAObserver
from sglp_llm.errors import UserError, unknown
from sglp_llm.method.proposals import distance_of, neighbours, propose, runs_of
from sglp_llm.method.segmentation import segment_layers
from sglp_llm.plan.recipe import TASK
from sglp_llm.records import Segment
from sglp_llm.trials import Removed, Trials
from sglp_llm.trials.costs import OBJECTIVES, TrialCosts

_LEAST_TRIALS = 16
_TRIALS_A_LAYER = 2.5
"""The default budget is this many trials on all sequences per removed layer, but at least `_LEAST_TRIALS`. There are more sets to
choose from when more layers are removed; greedy removal needs nearly as many trials per removed layer as there are layers."""


@dataclass(frozen=True)
class SearchBudget:
    """A budget in trial tokens, or in seconds."""

    tokens: int = 0
    seconds: float | None = None


def parse_budget(budget: int | str) -> SearchBudget:
    """``16000`` and ``"16k"`` are tokens; ``"30s"``, ``"5m"`` and ``"2h"`` are times.

    Raises:
        UserError: It is something else, or zero.
    """
    match = re.fullmatch(r"([0-9]{1,15})|([0-9]{1,15}(?:\.[0-9]{1,15})?)([ksmh])", str(budget))
    if match is not None:
        number, unit = float(match[1] or match[2]), match[3]
        if unit in ("s", "m", "h") and number > 0:
            return SearchBudget(seconds=number * {"s": 1, "m": 60, "h": 3600}[unit])
        if unit in (None, "k") and (tokens := round(number * (1000 if unit else 1))) > 0:
            return SearchBudget(tokens=tokens)
    raise UserError(f"budget of search must be tokens (16000, 16k) or a time (30s, 5m, 2h), not {budget!r}")


class Search(SetCriterion):
    """Racing and swaps over sets of layers (our choice; successive halving is Jamieson & Talwalkar's, arXiv 1502.07943).

    The last trial sequences are held out. One forward pass over the others gives the CKA segments and the angular distances
    between the hidden states that enter any two layers. The sets with the least distance race (successive halving): all of them
    run on the first sequence, the better ones on a quarter of the sequences, the best on all. Then sets that differ from the
    leaders by one swapped layer race in the same way, until all are tried or the budget is spent.

    The result is the first set in the final ranking that is not worse, on the held-out sequences, than the baseline: the set with
    the least distance, which needs no trials. With a single sequence nothing is held out.

    Args:
        num_layers: Number of decoder layers.
        seed: Not used: the search is not random.
        objective: ``kl``, the divergence from the whole model's next-token distribution, or ``loss``. ``task:NAME`` searches by
            ``kl``; the finalists are then scored on tasks by whoever called.
        budget: Trial tokens (``16000``, ``"16k"``) or wall time (``"30s"``, ``"5m"``, ``"2h"``) after which no further
            stage of a race begins; ``None`` means the tokens of 16 trials on all trial sequences, or of 2.5 trials per
            removed layer if that is more.
        proposals: Number of sets in the first race; each later race has half as many swaps.
        runs: Maximum number of runs of consecutive layers in a proposed set.
        beam: Number of leaders whose swaps are tried.
        held_out: Share of the trial sequences that is held out.

    Attributes:
        segments: The segments that the proposals are made from.
        trace: The stages of the last search's races: name, number of sequences, and each set with its mean cost on them.
    """

    needs = Need.TRIALS
    needs_with_trials = Need.HIDDEN_STATES
    keeps_trials = True

    def __init__(
        self,
        num_layers: int,
        seed: int = 0,
        *,
        objective: str = "kl",
        budget: int | str | None = None,
        proposals: int = 24,
        runs: int = 3,
        beam: int = 2,
        held_out: float = 0.25,
    ) -> None:
        super().__init__(num_layers, seed)
        self._scored_by, objective = objective, "kl" if str(objective).startswith(TASK) else objective
        if objective not in OBJECTIVES:
            raise unknown("objective of search", objective, (*OBJECTIVES, f"{TASK}NAME"))
        if self._scored_by == TASK:
            raise UserError(f"objective of search: {TASK} must be followed by the name of a task or a suite")
        for name, value in (("proposals", proposals), ("runs", runs), ("beam", beam)):
            if type(value) is not int or value < 1:
                raise UserError(f"{name} of search must be a positive whole number, not {value!r}")
        if not isinstance(held_out, float) or not 0 < held_out < 1:
            raise UserError(f"held_out of search must be a number between 0 and 1, not {held_out!r}")
        self._objective, self._proposals, self._runs, self._beam = objective, proposals, runs, beam
        self._held_out = held_out
        self._budget = None if budget is None else parse_budget(budget)
        self.trace: list[dict[str, Any]] = []
        self._report: dict[str, Any] = {}
        self._searched: tuple[int, range] | None = None

    def price(self, sequences: int, length: int) -> str:
        if self._budget is None:
            least, first_more = _default_budget(1, sequences, length), int(_LEAST_TRIALS / _TRIALS_A_LAYER) + 1
            return f"about {least.tokens:,} trial tokens, more from {first_more} layers on"
        if self._budget.seconds is not None:
            return f"about {self._budget.seconds:g} s of trials"
        return f"about {self._budget.tokens:,} trial tokens"

    def on_trials(self, trials: Trials) -> None:
        self._trials, self._searched = trials, None
        sequences = trials.calibration.input_ids.shape[0]
        self._parts = split(sequences, self._held_out) if sequences > 1 else Parts(range(1), range(1, 1))
        cka, turning = CKAObserver(self.num_layers), Angular(self.num_layers, tokens="all")
        run_pass(
            trials.model,
            trials.calibration.first(len(self._parts.fit)),
            [cka, turning],
            PassSettings(trials.batch_size, trials.progress, trials.processes),
        )
        self._distances = turning.distances()
        self.cka = cka.result()
        self.segments: tuple[Segment, ...] = segment_layers(self.cka, None)

    def choose(self, n: int, removable: Sequence[int]) -> list[int]:
        return sorted(self.finalists(n, removable)[0][0])

    def runners_up(self, n: int, removable: Sequence[int]) -> list[Removed]:
        return [removed for removed, _ in self.finalists(n, removable)[1:]]

    def finalists(self, n: int, removable: Sequence[int]) -> list[tuple[Removed, float]]:
        """The chosen set, then the sets ranked after it among those that ran on the most sequences, with their mean costs.

        Args:
            n: Number of layers to remove.
            removable: Layers that may be removed, ascending and without gaps.
        """
        among = range(removable[0], removable[-1] + 1)
        if (n, among) != self._searched:
            self._searched, self._found = (n, among), self._search(n, among)
        return self._found

    def report(self) -> Mapping[str, Any]:
        return self._report

    def _search(self, n: int, among: range) -> list[tuple[Removed, float]]:
        self._costs = TrialCosts(self._trials, self._objective, self._parts.fit)
        self._limit = self._budget or _default_budget(n, *self._trials.calibration.input_ids.shape)
        self._start, self.trace = time.perf_counter(), []
        proposed = propose(n, among, self.segments, self._distances, self._proposals, self._runs)
        mended = [self.staying.mended(each, among) for each in proposed] if self.staying else proposed
        entrants = list(dict.fromkeys(each for each in mended if each is not None))
        if not entrants:
            raise UserError(f"drop {n}: so many layers cannot go together: {self.staying.lines[0]}")
        baseline, tried = entrants[0], set(entrants)
        self._race(entrants, "proposals")
        while not self._is_spent():
            leaders = self._costs.ranking()[: self._beam]
            swaps = {swap for leader in leaders for swap in neighbours(leader, among, self.segments)} - tried
            swaps = {swap for swap in swaps if not self.staying.broken_by(swap)}
            if not swaps:
                break
            by_distance = sorted(swaps, key=lambda each: (distance_of(each, self._distances), sorted(each)))
            entrants = by_distance[: max(2, self._proposals // 2)]
            tried |= set(entrants)
            self._race(entrants, "swaps")
        return self._judged(baseline)

    def _race(self, entrants: Sequence[Removed], name: str) -> None:
        """Successive halving: on the first sequence, then on a quarter of the sequences, then on all."""
        field, everything = list(entrants), len(self._parts.fit)
        for count in sorted({1, max(1, everything // 4), everything}):
            self._costs.extend(field, count)
            field = self._costs.ranking(field)
            tried = [[_shown(each), _rounded(self._costs.mean(each))] for each in field]
            self.trace.append({"race": name, "sequences": count, "costs": tried})
            if self._is_spent():
                break
            field = field[: max(2, math.ceil(len(field) / 4))]

    def _judged(self, baseline: Removed) -> list[tuple[Removed, float]]:
        """The ranking from the first set on that is not worse than the baseline on the held-out sequences.

        The baseline is in the ranking, so there always is one.
        """
        found = self._costs
        found.extend([baseline], found.most)  # it may have been eliminated early
        ranking = found.ranking()
        if math.isinf(found.mean(ranking[0])):
            raise UserError(
                f"search: the {self._objective} of no trial is finite: are the weights damaged, or is the dtype too small "
                "(try --dtype float32)?"
            )
        judge = TrialCosts(self._trials, self._objective, self._parts.held_out)
        passed_over = 0
        if self._parts.held_out:
            for removed in ranking:
                judge.extend([removed, baseline], len(self._parts.held_out))
                if judge.mean(removed) <= judge.mean(baseline):
                    break
                passed_over += 1
        winner = ranking[passed_over]

        def verdict(removed: Removed) -> dict[str, Any]:
            held_out = _rounded(judge.mean(removed)) if self._parts.held_out else None
            return {"removed": sorted(removed), "cost": _rounded(found.mean(removed)), "held_out": held_out}

        self._report = {
            "objective": self._scored_by,
            "sequences": {name: len(part) for name, part in self._parts.items()},
            "tokens": found.tokens + judge.tokens,
            "segments": [[segment.start, segment.stop] for segment in self.segments],
            "races": self.trace,
            "winner": verdict(winner),
            "least_distance": verdict(baseline),
            "passed_over": [verdict(removed) for removed in ranking[:passed_over]],
        }
        return [(each, found.mean(each)) for each in ranking[passed_over:]]

    def _is_spent(self) -> bool:
        if self._limit.seconds is None:
            return self._costs.tokens >= self._limit.tokens
        is_late = time.perf_counter() - self._start >= self._limit.seconds
        processes = self._trials.processes  # the main process's clock decides: all must run the same trials
        return bool(processes.sum(torch.tensor(float(is_late and processes.is_main), dtype=torch.float64)))


def _default_budget(n: int, sequences: int, length: int) -> SearchBudget:
    return SearchBudget(tokens=math.ceil(max(_LEAST_TRIALS, _TRIALS_A_LAYER * n) * sequences * length))


def _shown(removed: Removed) -> str:
    """A short form, ``10..14 17``, because a plan stores many sets."""
    return " ".join(str(start) if stop == start + 1 else f"{start}..{stop - 1}" for start, stop in runs_of(removed))


def _rounded(cost: float) -> float | None:
    return round(cost, 6) if math.isfinite(cost) else None


CRITERION = Search
