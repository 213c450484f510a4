"""Frozen records that several subpackages share. Layer indices are 0-based and always those of the ORIGINAL model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Segment:
    """Consecutive decoder layers ``[start, stop)`` with similar representations."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def layers(self) -> range:
        """The indices of the segment's layers."""
        return range(self.start, self.stop)


@dataclass(frozen=True, eq=False)
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
        """``s_l = sum_j CKA[l, j]``, one number per layer."""
        return [float(value) for value in self.values.sum(dim=0)]

    def __eq__(self, other: object) -> bool:
        # A dataclass would compare the tensors with ==, which gives a tensor.
        return isinstance(other, SimilarityMatrix) and self.kernel == other.kernel and self.values.equal(other.values)


@dataclass(frozen=True)
class Footprint:
    """What a model takes in memory, by decoder layer.

    Attributes:
        itemsize: Bytes of one number, in the weights and in the KV cache.
        outside: Number of parameters outside the decoder layers, tied ones once.
        layers: Number of parameters of each decoder layer.
        cached: How many numbers each decoder layer caches for a token: its keys and values.
        cached_tokens: The largest number of tokens that each decoder layer caches; ``None`` without a sliding window.
        positions: The longest context in tokens; ``None`` where the configuration sets no limit.
    """

    itemsize: int
    outside: int
    layers: tuple[int, ...]
    cached: tuple[int, ...]
    cached_tokens: tuple[int | None, ...]
    positions: int | None

    def params_without(self, removed: Sequence[int]) -> int:
        """Number of parameters without the given layers."""
        return self.outside + sum(self.layers) - sum(self.layers[layer] for layer in removed)

    def cache_bytes_without(self, removed: Sequence[int], context: int) -> int:
        """Bytes of the KV cache of one sequence of ``context`` tokens, without the given layers."""
        return self.itemsize * sum(
            numbers * (context if limit is None else min(context, limit))
            for layer, (numbers, limit) in enumerate(zip(self.cached, self.cached_tokens, strict=True))
            if layer not in removed
        )

    def bytes_without(self, removed: Sequence[int], context: int) -> int:
        """Bytes of the weights and of that KV cache, without the given layers."""
        return self.itemsize * self.params_without(removed) + self.cache_bytes_without(removed, context)


@dataclass(frozen=True)
class DecodeTimes:
    """Measured decode times of a model at several depths.

    Attributes:
        depths: Numbers of decoder layers, the whole model's first.
        seconds: Time from one token to the next at each depth.
        device: What it was measured on.
    """

    depths: tuple[int, ...]
    seconds: tuple[float, ...]
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"depths": list(self.depths), "seconds": list(self.seconds), "device": self.device}


@dataclass(frozen=True)
class Budget:
    """How much to remove: exactly one of these.

    Attributes:
        ratio: Share of the decoder layers, in (0, 1); ``floor(ratio * L + 0.5)`` layers are removed.
        drop: Number of decoder layers.
        target_params: Largest number of parameters that may remain; as few layers as possible are removed to reach it.
        target_memory: The same for the bytes of weights and KV cache of one sequence, such as ``6GB``.
        target_latency: The same for the decode time of a token: ``0.8x`` of the whole model's, or ``25ms``.
    """

    ratio: float | None = None
    drop: int | None = None
    target_params: int | None = None
    target_memory: str | None = None
    target_latency: str | None = None

    def to_dict(self) -> dict[str, float | int | str]:
        """The one field that is set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class ModelIdentity:
    """Identifies a model.

    Attributes:
        name: The Hub id, folder or file as the user wrote it.
        model_type: transformers' ``config.model_type``.
        fingerprint: ``sha256:...`` over the configuration and every tensor's name, dtype and shape: the same for two copies
            of a checkpoint, whatever their location and sharding; different for another architecture or size.
    """

    name: str
    model_type: str
    fingerprint: str


@dataclass(frozen=True)
class PrunePlan:
    """Which decoder layers are kept. An analysis makes the plan, an export carries it out.

    Attributes:
        num_layers: Depth of the original model.
        kept: Original indices of the kept layers, ascending.
        source: The model the plan was made for; ``None`` when a hand-written plan does not name one.
        revision: The Hub commit the plan was made for.
        segments: The partition of the layers that was used; empty when there was none.
        scores: Per-layer scores by name, each of length ``num_layers``.
        similarity: The CKA matrix that the segments come from; ``None`` when there was none.
        footprint: What the original model takes in memory, in the dtype of the checkpoint; ``None`` when it is not known.
        budget: The requested budget, as in `Budget.to_dict`.
        settings: Every other setting that led to the plan.
        versions: Versions of the software that made it.
        replaced: New values from a compensation for parameters of kept layers, by the parameter's name in the transformers
            model (with its ORIGINAL layer index), in the parameter's shape and dtype.
        compensation: What was fitted and how well, as plain data; empty without compensation.
    """

    num_layers: int
    kept: tuple[int, ...]
    source: ModelIdentity | None = None
    revision: str | None = None
    segments: tuple[Segment, ...] = ()
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    similarity: SimilarityMatrix | None = None
    footprint: Footprint | None = None
    budget: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    replaced: Mapping[str, torch.Tensor] = field(default_factory=dict)
    compensation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def removed(self) -> tuple[int, ...]:
        """Original indices of the removed layers, ascending."""
        kept = set(self.kept)
        return tuple(layer for layer in range(self.num_layers) if layer not in kept)


@dataclass(frozen=True)
class Analysis:
    """What `analyze` returns: the plan, and what it is based on.

    Attributes:
        plan: Which layers are kept.
        calibration_loss: Mean loss of the calibration sequences in nats per token; ``None`` when no gradients were computed.
    """

    plan: PrunePlan
    calibration_loss: float | None

    @property
    def params_before(self) -> int:
        """Parameters of the model."""
        assert self.plan.footprint is not None
        return self.plan.footprint.params_without(())

    @property
    def params_after(self) -> int:
        """Parameters without the plan's removed layers."""
        assert self.plan.footprint is not None
        return self.plan.footprint.params_without(self.plan.removed)

    @property
    def similarity(self) -> SimilarityMatrix | None:
        """The CKA matrix; ``None`` when the criterion does not use it."""
        return self.plan.similarity


@dataclass(frozen=True)
class HealingRecord:
    """One training of a shortened model.

    Attributes:
        student: The shortened model.
        teacher: The model whose predictions were the target; ``None`` without one.
        data: The training text, with its split where it has one.
        data_hash: Of the token sequences and labels.
        sequences: Number of different training sequences.
        held_out: Number of held-out sequences.
        tokens: Tokens that were trained on until the best weights, repetitions included.
        steps: Optimizer steps that were planned.
        best_step: The step whose weights were kept.
        parameters: Number of trained parameters.
        before: Held-out losses at the start, nats a token: ``loss`` (what is minimised), ``next_token_loss``, and with a teacher
            ``divergence``.
        after: The same with the weights that were kept.
        stopped: Why training ended before the last step; ``None`` when it did not.
        settings: The healing recipe.
        versions: Versions of the software.
    """

    student: ModelIdentity
    teacher: ModelIdentity | None
    data: str
    data_hash: str
    sequences: int
    held_out: int
    tokens: int
    steps: int
    best_step: int
    parameters: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    stopped: str | None
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class HealReport:
    """What `heal` returns.

    Attributes:
        output: The folder that was written.
        record: What was done.
        log: One entry a step, and one a measurement of the held-out losses.
        bytes_written: Size of the folder's weight files; 0 in a process that left the writing to the main one.
        verification: What the reload check found, as plain data; ``None`` when it was switched off, or left to the main process.
        seconds: Wall time by stage.
    """

    output: str
    record: HealingRecord
    log: Sequence[Mapping[str, Any]]
    bytes_written: int
    verification: Mapping[str, Any] | None
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class RunReport:
    """What `prune` returns.

    Attributes:
        output: The folder that was written.
        plan: Which layers are kept.
        bytes_written: Size of the folder's weight files; 0 in every process but the main one.
        verification: Result of the reload check, as plain data; ``None`` without one, and in every process but the main one.
        seconds: Wall time by stage.
        analysis: ``None`` when the plan was given.
        healing: The training after the removal; ``None`` without one.
        notes: What else the user should know, one line each.
    """

    output: str
    plan: PrunePlan
    bytes_written: int
    verification: Mapping[str, Any] | None
    seconds: Mapping[str, float]
    analysis: Analysis | None
    healing: HealReport | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class ComparisonRow:
    """One method at one depth.

    Attributes:
        method: Name of the method: a criterion or preset, with ``+`` and the compensation where one is added.
        ratio: Share of the layers that are removed.
        removed: Original indices of the removed layers, ascending.
        results: Numbers by measurement and name. ``log_gap`` is ln(perplexity / dense perplexity); its standard error is that
            of the paired differences over windows.
        losses: See `Measured`, by measurement.
        plan: Folder of the plan, relative to the comparison's.
        compensation_seconds: Wall time of the compensation and of training after it, shared by rows that have the same;
            0 without.
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
    """A method compared with the best single criterion at the same depth, on one measurement.

    Attributes:
        method: The method.
        best: The best single criterion at this depth.
        layers_removed: The depth.
        measurement: Name of the measurement.
        difference: Of the log perplexities, or of a suite's averages: the method's minus the best criterion's.
        difference_standard_error: Of the paired differences over windows; for averages, from the tasks' own standard errors,
            ``None`` where a task has none.
        gap_ratio: The method's ``log_gap`` over the best criterion's; below 1, the method loses less. ``None`` for a suite, and
            where the best criterion loses nothing.
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
        dense: Numbers of the dense model, by measurement and name.
        dense_losses: See `Measured`, by measurement.
        rows: One per method and depth, in the requested order.
        pairs: Methods compared with the best single criterion.
        selection_seconds: Wall time of each layer selection; methods that select alike share one. The criteria that share a
            pass are counted together under ``shared pass``.
        settings: The settings of the comparison.
        versions: Versions of the software.
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
