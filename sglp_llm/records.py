"""The frozen records that cross rooms. Layer indices are 0-based and always those of the ORIGINAL model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Segment:
    """Consecutive decoder layers ``[start, stop)`` whose representations are alike."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def layers(self) -> range:
        """The indices of the segment's layers."""
        return range(self.start, self.stop)


@dataclass(frozen=True)
class SimilarityMatrix:
    """Minibatch CKA between the outputs of every pair of decoder layers.

    Attributes:
        values: ``[layers, layers]``, float64, symmetric, ones on the diagonal; the estimate may fall slightly below 0.
        kernel: ``"cosine"`` or ``"linear"``.
    """

    values: torch.Tensor
    kernel: str

    @property
    def column_sums(self) -> list[float]:
        """``s_l = sum_j CKA[l, j]``, one number a layer."""
        return [float(value) for value in self.values.sum(dim=0)]


@dataclass(frozen=True)
class Budget:
    """How much to remove: exactly one of the three.

    Attributes:
        ratio: Share of the decoder layers, in (0, 1); ``floor(ratio * L + 0.5)`` layers go.
        drop: Number of decoder layers.
        target_params: Largest number of parameters that may be left; the fewest layers that reach it go.
    """

    ratio: float | None = None
    drop: int | None = None
    target_params: int | None = None

    def to_dict(self) -> dict[str, float | int]:
        """The one field that is set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class ModelIdentity:
    """What tells two models apart.

    Attributes:
        name: The Hub id, folder or file as the user wrote it.
        model_type: transformers' ``config.model_type``.
        fingerprint: ``sha256:...`` over the configuration and every tensor's name, dtype and shape: the same for two copies
            of a checkpoint wherever they lie and however they are sharded, different for another architecture or size.
    """

    name: str
    model_type: str
    fingerprint: str


@dataclass(frozen=True)
class PrunePlan:
    """Which decoder layers stay. The waist of the program: analysis makes plans, export consumes them.

    Attributes:
        num_layers: Depth of the original model.
        kept: Original indices of the layers that stay, ascending.
        source: The model the plan was made for; ``None`` when a person wrote the plan without saying.
        revision: The Hub commit the plan was made for.
        segments: The partition that was used; empty when there was none.
        scores: Per-layer numbers by name, each of length ``num_layers``.
        budget: What the user asked for, as in `Budget.to_dict`.
        settings: Every other setting that led to the plan.
        versions: Versions of the software that made it.
        replaced: Where a cut was compensated: new values of the layers that stay, by the parameter's name in the transformers
            model (with its ORIGINAL layer index), in the shape and dtype of what they replace.
        compensation: What was fitted and how well, as plain data; empty without compensation.
    """

    num_layers: int
    kept: tuple[int, ...]
    source: ModelIdentity | None = None
    revision: str | None = None
    segments: tuple[Segment, ...] = ()
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    replaced: Mapping[str, torch.Tensor] = field(default_factory=dict)
    compensation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def removed(self) -> tuple[int, ...]:
        """Original indices of the layers that go, ascending."""
        kept = set(self.kept)
        return tuple(layer for layer in range(self.num_layers) if layer not in kept)


@dataclass(frozen=True)
class Analysis:
    """What `analyze` returns: the plan, and what it was made from.

    Attributes:
        plan: Which layers stay.
        similarity: The CKA matrix; ``None`` when the criterion does not use it.
        calibration_loss: Mean loss of the calibration sequences in nats a token; ``None`` when no gradients were taken.
        params_before: Parameters of the model.
        params_after: Parameters with the plan's layers removed.
    """

    plan: PrunePlan
    similarity: SimilarityMatrix | None
    calibration_loss: float | None
    params_before: int
    params_after: int


@dataclass(frozen=True)
class RunReport:
    """What `prune` returns.

    Attributes:
        output: The folder that was written.
        plan: Which layers stay.
        bytes_written: Size of the folder's weight files; 0 in a process that left the writing to the main one.
        verification: What the reload check found, as plain data; ``None`` when it was switched off, or left to the main process.
        seconds: Wall time by stage.
        analysis: ``None`` when the plan was given.
    """

    output: str
    plan: PrunePlan
    bytes_written: int
    verification: Mapping[str, Any] | None
    seconds: Mapping[str, float]
    analysis: Analysis | None


@dataclass(frozen=True)
class ComparisonRow:
    """One method at one depth.

    Attributes:
        method: Its name: a criterion or preset, with ``+`` and the compensation where one is added.
        ratio: Share of the layers that are removed.
        removed: Original indices of the layers that are removed, ascending.
        results: Numbers by measurement and name. ``log_gap`` is ln(perplexity / dense perplexity), and its standard error that
            of the differences over windows.
        losses: See `Measured`, by measurement.
        plan: Folder of the plan, in that of the comparison.
        compensation_seconds: Wall time of the compensation, which rows that remove the same layers share; 0 without one.
    """

    method: str
    ratio: float
    removed: tuple[int, ...]
    results: dict[str, dict[str, float]]
    losses: dict[str, tuple[float, ...]]
    plan: str
    compensation_seconds: float


@dataclass(frozen=True)
class Pair:
    """A method against the best single criterion at the same depth, on one measurement.

    Attributes:
        method: The method.
        best: The single criterion that did best there.
        layers_removed: The depth.
        measurement: Name of the measurement.
        difference: Of the log perplexities, or of a suite's averages: the method's less the best's.
        difference_standard_error: Over windows, pair by pair; of averages from the tasks' own standard errors, ``None`` where a
            task has none.
        gap_ratio: The method's ``log_gap`` over the best's: below 1, less is lost. ``None`` of a suite, and where the best loses
            nothing.
        gap_ratio_standard_error: By the delta method.
    """

    method: str
    best: str
    layers_removed: int
    measurement: str
    difference: float
    difference_standard_error: float | None
    gap_ratio: float | None = None
    gap_ratio_standard_error: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns.

    Attributes:
        model: Name of the model.
        num_layers: Its depth.
        dense: Numbers of the whole model, by measurement and name.
        dense_losses: See `Measured`, by measurement.
        rows: One a method and depth, in the order in which they were asked for.
        pairs: Methods against the best single criterion.
        selection_seconds: Wall time of each criterion's selection, which methods that choose alike share. Criteria that share
            the pass share its time, which stands under ``shared pass``.
        settings: What led to the numbers.
        versions: The software.
    """

    model: str
    num_layers: int
    dense: dict[str, dict[str, float]]
    dense_losses: dict[str, tuple[float, ...]]
    rows: tuple[ComparisonRow, ...]
    pairs: tuple[Pair, ...]
    selection_seconds: dict[str, float]
    settings: dict[str, Any]
    versions: dict[str, str]
