"""Predicts how long a run takes on a named GPU with either engine, and what most of the time goes to.

Counted are matrix products in the model's dtype and in float64, and bytes of weights that are read from the disk and sent over
the bus. A rate is a share of what the maker states: products of a model are smaller than the best ones, and what lies between
them takes time too. The result is meant to be right within a factor of two; launching kernels, which takes most of the time of a
tiny model, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from sglp_llm.adapters import text_config
from sglp_llm.compensation import NONE, get_method
from sglp_llm.criteria import GreedyCriterion, get_criterion
from sglp_llm.engine import Need
from sglp_llm.errors import UserError, unknown
from sglp_llm.memory.dry_run import DryRun, dry_run
from sglp_llm.memory.parameter_counts import ParameterCounts, count_parameters
from sglp_llm.memory.peaks import Work
from sglp_llm.plan import Recipe

EFFICIENCY = 0.5
"""Share of a stated rate that the products of a model reach."""

DISK = 2e9
"""Bytes a second that a disk gives, where nothing else is known."""

GHOST_PENALTY = 1.15
"""As the choice between the two ways to norms of gradients weighs it (`sglp_llm.engine.norms.ghost`)."""


@dataclass(frozen=True)
class Accelerator:
    """Stated rates of a GPU.

    Attributes:
        half: FLOPs a second in bfloat16, dense.
        single: The same in float32.
        double: The same in float64.
        bus: Bytes a second between host and device.
    """

    half: float
    single: float
    double: float
    bus: float

    def rate(self, dtype: torch.dtype) -> float:
        """FLOPs a second that a model in this dtype reaches."""
        return EFFICIENCY * (self.half if dtype.itemsize == 2 else self.single)


ACCELERATORS = {
    "a100": Accelerator(312e12, 19.5e12, 19.5e12, 25e9),
    "h100": Accelerator(989e12, 67e12, 67e12, 50e9),
    "h200": Accelerator(989e12, 67e12, 67e12, 50e9),
    "l4": Accelerator(121e12, 30e12, 0.47e12, 25e9),
    "l40s": Accelerator(362e12, 91e12, 1.4e12, 25e9),
    "rtx4090": Accelerator(165e12, 82e12, 1.3e12, 25e9),
}


@dataclass(frozen=True)
class Duration:
    """Seconds by what they go to: ``products``, ``float64``, ``bus`` and ``disk``.

    Attributes:
        engine: ``resident`` or ``streamed``.
        terms: Seconds of each.
    """

    engine: str
    terms: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """The resident engine loads the model and then computes; the streamed one does both at the same time."""
        computing = self.terms["products"] + self.terms["float64"]
        moving = max(self.terms["bus"], self.terms["disk"])
        return computing + moving if self.engine == "resident" else max(computing, moving)

    @property
    def dominating(self) -> str:
        """The largest term."""
        return max(self.terms, key=lambda name: self.terms[name])


@dataclass(frozen=True)
class Costs:
    """What one phase costs, or several added up.

    Attributes:
        products: FLOPs in the model's dtype, with the resident engine.
        again: More of them with the streamed engine.
        double: FLOPs in float64.
        walks: How often all layers' weights are read with the streamed engine.
    """

    products: float = 0.0
    again: float = 0.0
    double: float = 0.0
    walks: float = 0.0

    def __add__(self, other: Costs) -> Costs:
        return Costs(
            self.products + other.products,
            self.again + other.again,
            self.double + other.double,
            self.walks + other.walks,
        )


def accelerator(name: str) -> Accelerator:
    """The GPU of that name.

    Raises:
        UserError: It is not one of `ACCELERATORS`.
    """
    if name not in ACCELERATORS:
        raise unknown("device", name, list(ACCELERATORS))
    return ACCELERATORS[name]


def predict_durations(
    config: PretrainedConfig, dtype: torch.dtype, recipe: Recipe, work: Work, device: Accelerator, disk: float = DISK
) -> tuple[Duration, Duration]:
    """The seconds of an analysis with its compensation, and of the training after it, with the resident and the streamed engine.

    Args:
        config: The resolved configuration.
        dtype: The dtype of the computation.
        recipe: For the criteria, the compensation and the training.
        work: The recipe's (`sglp_llm.memory.prediction.work_of`).
        device: See `accelerator`.
        disk: Bytes a second that the disk of the weights gives.

    Raises:
        UserError: transformers cannot run such a configuration.
    """
    try:
        dry = dry_run(config, dtype)
        model = _Model(dry, count_parameters(dry.model, dry.layers), config, work.seq_len)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"the time cannot be predicted: a model of this configuration does not run ({reason})"
        ) from None
    costs = _analysis(model, work) + _trials(model, recipe, work) + _compensation(model, recipe, work)
    healing = _healing(model, recipe, work)
    weights, layers = (count * dtype.itemsize for count in (model.counts.total, model.counts.layer * model.layers))
    durations = []
    for engine in ("resident", "streamed"):
        is_streamed = engine == "streamed"
        moved = weights - layers + costs.walks * layers if is_streamed else weights
        products = costs.products + is_streamed * costs.again + healing.products
        terms = {
            "products": products / device.rate(dtype),
            "float64": costs.double / (EFFICIENCY * device.double),
            "bus": moved / device.bus,
            "disk": moved / disk,
        }
        durations.append(Duration(engine, terms))
    return durations[0], durations[1]


class _Model:
    """FLOPs of the parts of a model, for a number of tokens in sequences of one length."""

    def __init__(self, dry: DryRun, counts: ParameterCounts, config: PretrainedConfig, tokens: int) -> None:
        self.counts, self.layers, self._length = counts, len(dry.layers), tokens
        text = text_config(config)
        self.hidden, self._vocabulary = int(text.hidden_size), int(text.vocab_size)
        linears: list[Any] = [module for module in dry.layers.modules() if type(module) in (nn.Linear, Conv1D)]
        self.shapes = [(int(linear.weight.shape[0]), int(linear.weight.shape[1])) for linear in linears]

    def attention(self, tokens: float) -> float:
        """Both products, half of them masked."""
        return 2 * self.layers * self.hidden * self._length * tokens

    def forward(self, tokens: float) -> float:
        return 2 * self.counts.matrices * tokens + self.attention(tokens)

    def head(self, tokens: float) -> float:
        return 2 * self._vocabulary * self.hidden * tokens

    def norms(self, tokens: float) -> float:
        """The cheaper of Gram matrices and gradients, for every linear."""
        grams = ((GHOST_PENALTY * self._length / 2 * (rows + columns), rows * columns) for rows, columns in self.shapes)
        return 2 * tokens * sum(map(min, grams))


def _analysis(model: _Model, work: Work) -> Costs:
    """One pass: forward, backward by what goes in, norms or whole gradients; the streamed engine runs each layer once more."""
    tokens = work.samples * work.seq_len
    minibatches = math.ceil(tokens / max(1, work.minibatch)) if Need.HIDDEN_STATES in work.needs else 0
    rows = min(work.minibatch, tokens)
    cka = minibatches * rows**2 * (2 * model.layers * model.hidden + 2 * model.layers**2)
    if work.needs & Need.BACKWARD:
        products = 2 * (model.forward(tokens) + model.head(tokens)) + model.attention(tokens)
        if Need.GRADIENTS in work.needs:
            products += 2 * model.counts.matrices * tokens
        elif Need.GRADIENT_NORMS in work.needs:
            products += model.norms(tokens)
        return Costs(products, model.forward(tokens), cka, 2)
    if Need.HIDDEN_STATES in work.needs:
        return Costs(model.forward(tokens), 0, cka, 1)
    return Costs(walks=1)


def _trials(model: _Model, recipe: Recipe, work: Work) -> Costs:
    """Trials share what lies in front of the removed layers, about 40 % of the layers that they would run alone."""
    costs, removed = Costs(), _removed(model, work)
    for name in (recipe.deciding_criterion, *recipe.also):
        criterion = get_criterion(name)
        if Need.TRIALS not in criterion.needs:
            continue
        count, rounds = model.layers, 1
        if issubclass(criterion, GreedyCriterion):
            count, rounds = sum(model.layers - gone for gone in range(removed)), removed
        elif criterion.needs_with_trials:  # a search within a budget
            count, rounds = max(16, math.ceil(2.5 * removed)), 8
        tokens = count * work.trial_samples * work.seq_len
        costs += Costs(0.6 * model.forward(tokens) + model.head(tokens), walks=rounds)
    return costs


def _compensation(model: _Model, recipe: Recipe, work: Work) -> Costs:
    """Every cut: its equations, and the loss of the shortened model with and without new values; then the refinement."""
    if work.compensation is None:
        return Costs()
    tokens, cuts = work.samples * work.seq_len, max(1, math.ceil(_removed(model, work) / 2))
    double = 0.0
    if work.compensation:
        width = model.counts.mlp_width if work.of_inputs else model.hidden
        double = cuts * (2 * tokens * width * (width + model.hidden) + 7 * (width**3 / 3 + 4 * width**2 * model.hidden))
    costs = Costs((2 + cuts) * model.forward(tokens) + cuts * model.head(tokens), 0, double, 2 + cuts)
    if not work.refined_sequences or recipe.compensate == NONE:
        return costs
    epochs = getattr(get_method(recipe.compensate), "schedule").epochs  # noqa: B009 - methods with gradients have one
    share, fit = work.refined(model.layers) / model.layers, (1 - recipe.held_out) * tokens
    own = share * model.forward(1)
    trained = epochs * fit * (3 * own + 4 * model.head(1))
    judged = (2 * fit / 3 + (1 + epochs) * recipe.held_out * tokens) * (own + 3 * model.head(1))
    steps = epochs * fit / (work.refined_sequences * work.seq_len)
    return costs + Costs(model.forward(tokens) + trained + judged, epochs * fit * own, 0, 1 + 2 * share * steps)


def _healing(model: _Model, recipe: Recipe, work: Work) -> Costs:
    """The teacher's forward pass, and the student's forward and backward pass with the gradients of its weights."""
    tokens = recipe.healing.tokens if recipe.healing is not None else None
    if not tokens:
        return Costs()
    kept = 1 - _removed(model, work) / model.layers
    whole = model.forward(tokens) + model.head(tokens)
    return Costs(whole + 3 * (kept * model.forward(tokens) + model.head(tokens)))


def _removed(model: _Model, work: Work) -> int:
    """How many layers are removed; a quarter where the budget is a target."""
    share = work.removed if 0 < work.removed < 1 else 0.25
    return int(work.removed) if work.removed >= 1 else max(1, int(share * model.layers))
