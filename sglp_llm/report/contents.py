"""What a report of one checkpoint or analysis shows, gathered from the files in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglp_llm.errors import UserError
from sglp_llm.method.segmentation import layer_partitions
from sglp_llm.method.selection import lowest_scores, segment_capacities
from sglp_llm.method.staying import staying_from
from sglp_llm.plan import PLAN_FILE_NAME, RECIPE_FILE_NAME, load_plan
from sglp_llm.plan.healing_recipe import HEALING_FILE_NAME, LOG_FILE_NAME
from sglp_llm.plan.plan_fields import segments_of
from sglp_llm.plan.published import last_part, without_local_paths, without_paths
from sglp_llm.plan.results import Result, read_results
from sglp_llm.records import PrunePlan, Segment
from sglp_llm.report.drawing import Chart, Mark, chart, shade
from sglp_llm.sizes import show_bytes, show_count
from sglp_llm.small_files import read_json, read_json_lines

_HEAT_MAP = 400.0
_RACES = 3
_SETS = 12


@dataclass(frozen=True)
class HeatMap:
    """The CKA matrix.

    Attributes:
        size: Side of the drawing.
        cell: Side of a cell.
        cells: Row by row; their labels name both layers and the value.
        borders: Where a segment begins, in the drawing's units, without the first.
        removed: Where a removed layer's row and column begin.
    """

    size: float
    cell: float
    cells: tuple[Mark, ...]
    borders: tuple[float, ...]
    removed: tuple[float, ...]


@dataclass(frozen=True)
class Gain:
    """What one step changed, on text that it did not learn from.

    Attributes:
        step: The step.
        quantity: What was measured, in nats a token.
        before: Without it.
        after: With it.
    """

    step: str
    quantity: str
    before: float
    after: float


@dataclass(frozen=True)
class Contents:
    """Everything in a report; what a folder does not hold is empty or ``None``.

    Attributes:
        name: Of the model.
        num_layers: Of the original.
        removed: Indices of the removed layers.
        segments: For each layer the number of its segment.
        heat_map: The CKA matrix.
        scores: A drawing for each score, by its name; the deciding one first.
        fisher: The Fisher loss against the number of segments.
        chosen_k: The number of segments.
        races: The last races of a search: what it was, and its sets with their costs.
        gains: What each repair and the training changed.
        training: The training loss against the step, and the held-out one.
        sizes: What is told of the model before and after: a name and two numbers as text.
        results: What was measured of the model with ``--record``; names without paths.
        choices: For every number of layers, which ones would go, and the parameters that stay; empty where no scores decide.
        settings: Names and values.
        versions: Names and versions.
        command: Makes the checkpoint again; empty without a recipe.
    """

    name: str
    num_layers: int
    removed: tuple[int, ...]
    segments: tuple[int, ...]
    heat_map: HeatMap | None
    scores: Mapping[str, Chart]
    fisher: Chart | None
    chosen_k: int
    races: Sequence[tuple[str, Sequence[tuple[str, float]]]]
    gains: Sequence[Gain]
    training: Mapping[str, Chart]
    sizes: Sequence[tuple[str, str, str]]
    results: Sequence[Result]
    choices: Sequence[tuple[Sequence[int], str]]
    settings: Sequence[tuple[str, str]]
    versions: Sequence[tuple[str, str]]
    command: str


def gather(folder: Path) -> Contents:
    """Reads a folder of `analyze`, `prune` or `heal`.

    Raises:
        UserError: It holds no plan, or a damaged one.
    """
    plan = load_plan(folder / PLAN_FILE_NAME)
    found = _segments(plan)
    segment_of = {layer: number for number, segment in enumerate(found) for layer in segment.layers}
    segments = tuple(segment_of.get(layer, 0) for layer in range(plan.num_layers))
    healing = _json(folder / HEALING_FILE_NAME)
    return Contents(
        name=last_part(plan.source.name) if plan.source else folder.name,
        num_layers=plan.num_layers,
        removed=plan.removed,
        segments=segments,
        heat_map=_heat_map(plan, found),
        scores=_scores(plan, segments),
        fisher=_fisher(plan),
        chosen_k=max(1, len(found)),
        races=_races(plan.settings),
        gains=gains_of(plan, healing),
        training=_training(folder / LOG_FILE_NAME),
        sizes=sizes_of(plan),
        results=[replace(each, name=without_paths(each.name)) for each in read_results(folder)],
        choices=_choices(plan),
        settings=[
            *((key, _short(key, value)) for key, value in plan.settings.items() if _is_shown(key, value)),
            *(("layers that must stay", line) for line in limits_of(plan)),
        ],
        versions=[(key, str(value)) for key, value in plan.versions.items()],
        command=f"sglp-llm prune --recipe {RECIPE_FILE_NAME} --output NEW_FOLDER"
        if (folder / RECIPE_FILE_NAME).is_file()
        else "",
    )


def _segments(plan: PrunePlan) -> Sequence[Segment]:
    """Those inside which layers were compared, or those that a search has made its proposals from."""
    search = plan.settings.get("search")
    given = search.get("segments") if isinstance(search, Mapping) else None
    if not isinstance(given, Sequence) or not all(
        isinstance(each, Sequence) and len(each) == 2 and all(type(end) is int for end in each) for each in given
    ):
        return plan.segments
    try:
        return segments_of([list(each) for each in given], plan.num_layers, "")
    except UserError:
        return plan.segments


def _heat_map(plan: PrunePlan, segments: Sequence[Segment]) -> HeatMap | None:
    if plan.similarity is None:
        return None
    cell = _HEAT_MAP / plan.num_layers
    rows = plan.similarity.values.tolist()
    cells = tuple(
        Mark(round(j * cell, 2), round(i * cell, 2), f"layers {i} and {j}: CKA {value:.4f}", color=shade(value))
        for i, row in enumerate(rows)
        for j, value in enumerate(row)
    )
    borders = tuple(round(segment.start * cell, 2) for segment in segments if segment.start)
    return HeatMap(_HEAT_MAP, round(cell, 3), cells, borders, tuple(round(layer * cell, 2) for layer in plan.removed))


def _scores(plan: PrunePlan, segments: Sequence[int]) -> dict[str, Chart]:
    deciding, drawn = plan.settings.get("scored_by"), dict[str, Chart]()
    gone = set(plan.removed)
    for name in sorted(plan.scores, key=lambda each: each != deciding):
        values = plan.scores[name]
        labels = [f"layer {layer}: {value:.6g}" for layer, value in enumerate(values)]
        removed = [layer in gone for layer in range(plan.num_layers)]
        found = chart(list(enumerate(values)), labels, segments=list(segments), removed=removed)
        if found is not None:
            drawn[name] = found
    return drawn


def _fisher(plan: PrunePlan) -> Chart | None:
    if plan.similarity is None:
        return None
    features = plan.settings.get("features")
    losses = layer_partitions(plan.similarity, features if features in ("column_sum", "rows") else "column_sum").losses
    return chart(list(enumerate(losses, 1)), [f"{k} segments: {loss:.6g}" for k, loss in enumerate(losses, 1)])


def _races(settings: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, float]]]]:
    """Plain data that may come from another program's plan: only what has the expected form is shown."""
    search = settings.get("search")
    races = search.get("races") if isinstance(search, Mapping) else None
    if not isinstance(races, Sequence):
        return []
    shown = []
    for race in races:
        costs = race.get("costs") if isinstance(race, Mapping) else None
        if isinstance(costs, Sequence) and all(isinstance(each, Sequence) and len(each) == 2 for each in costs):
            title = f"{race.get('race')}, sequences: {race.get('sequences')}"
            shown.append(
                (title, [(str(name), float(cost)) for name, cost in costs[:_SETS] if isinstance(cost, float | int)])
            )
    return shown[:_RACES]


def gains_of(plan: PrunePlan, healing: Mapping[str, Any]) -> list[Gain]:
    """What each repair, and the training whose record is ``healing``, changed on held-out text."""
    return [*_repairs(plan.compensation), *_trained(healing)]


def _repairs(compensation: Mapping[str, Any]) -> list[Gain]:
    gains = []
    refined = compensation.get("refined")
    stages = ((f"compensation {compensation.get('method', '')}", compensation), ("refinement", refined))
    for step, stage in stages:
        losses = stage.get("losses") if isinstance(stage, Mapping) else None
        change = losses.get("held_out") if isinstance(losses, Mapping) else None
        if isinstance(change, Mapping) and all(isinstance(change.get(end), float) for end in ("without", "with")):
            gains.append(Gain(step, "loss on held-out calibration text", change["without"], change["with"]))
    return gains


def _trained(record: Mapping[str, Any]) -> list[Gain]:
    before, after = record.get("before"), record.get("after")
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return []
    names = {"divergence": "divergence from the original on held-out text", "next_token_loss": "loss on held-out text"}
    return [
        Gain("training", said, before[name], after[name])
        for name, said in names.items()
        if isinstance(before.get(name), float) and isinstance(after.get(name), float)
    ]


def _training(file: Path) -> dict[str, Chart]:
    if not file.is_file():
        return {}
    log = read_json_lines(file, "log of a training")
    drawn = {}
    for name, key in (("training loss", "loss"), ("held-out loss", "eval_loss")):
        points = [
            (entry["step"], entry[key])
            for entry in log
            if type(entry.get("step")) is int and isinstance(entry.get(key), float)
        ]
        found = chart(points, [f"step {step}: {value:.4f}" for step, value in points])
        if found is not None:
            drawn[name] = found
    return drawn


def limits_of(plan: PrunePlan) -> list[str]:
    """Which layers had to stay, and why; one line each."""
    return staying_from(plan.settings.get("staying"), "the plan").lines


def sizes_of(plan: PrunePlan) -> list[tuple[str, str, str]]:
    """What is told of the model's size before and after: a name and two numbers as text; empty where it is not known."""
    found = plan.footprint
    if found is None:
        return []
    before, after = (found.params_without(gone) for gone in ((), plan.removed))
    cache = [found.cache_bytes_without(gone, 1) for gone in ((), plan.removed)]
    return [
        ("decoder layers", str(plan.num_layers), str(len(plan.kept))),
        ("parameters", show_count(before), show_count(after)),
        ("weights", show_bytes(found.itemsize * before), show_bytes(found.itemsize * after)),
        ("KV cache, a token", show_bytes(cache[0]), show_bytes(cache[1])),
    ]


def _choices(plan: PrunePlan) -> list[tuple[list[int], str]]:
    """The layers that the deciding scores would remove, for every number of them."""
    scores = plan.scores.get(str(plan.settings.get("scored_by")))
    protect = plan.settings.get("protect")
    if scores is None or not plan.segments or not isinstance(protect, Mapping):
        return []
    ends = (protect.get("first", 0), protect.get("last", 0))
    if not all(type(end) is int and 0 <= end <= plan.num_layers for end in ends):
        return []
    limits = staying_from(plan.settings.get("staying"), "the plan")
    most = sum(segment_capacities(plan.segments, ends, limits))
    choices = []
    for count in range(most + 1):
        try:
            gone = sorted(lowest_scores(count, plan.segments, scores, ends, limits))
        except UserError:  # no more can go
            break
        left = "" if plan.footprint is None else f"{show_count(plan.footprint.params_without(gone))} parameters stay"
        choices.append((gone, left))
    return choices


def _json(file: Path) -> Mapping[str, Any]:
    data = read_json(file, "record of a training") if file.is_file() else {}
    return data if isinstance(data, Mapping) else {}


def _is_shown(key: str, value: object) -> bool:
    return key != "staying" and (not isinstance(value, Mapping) or len(str(value)) < 200)


def _short(key: str, value: object) -> str:
    value = without_local_paths(value, key)
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
