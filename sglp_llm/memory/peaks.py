"""Predicts the peak memory of an analysis with each engine, from the configuration alone.

Counted are: parameters; what a decoder layer keeps for its backward pass and what the loss needs temporarily, by a dry run of
the model's own code; sums of gradients; stored hidden states; what CKA and similar observers collect. Two constants were
measured: the memory of the interpreter with its libraries, and the allocator's fragmentation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PretrainedConfig

from sglp_llm.adapters import adapter_of, text_config
from sglp_llm.compensation.repair.refine import MOVING_SHARE, REFINED_BYTES
from sglp_llm.engine import Need
from sglp_llm.engine.gradients import most_sequences
from sglp_llm.engine.head import CHUNK_BYTES, DEVICE_CHUNK_BYTES
from sglp_llm.engine.states import DEVICE_SHARE
from sglp_llm.errors import UserError
from sglp_llm.memory.dry_run import DryRun, dry_run
from sglp_llm.memory.parameter_counts import ParameterCounts, count_parameters
from sglp_llm.memory.records import EngineMemory, FreeMemory, MemoryPlan

RUNTIME = 520 * 10**6
"""Bytes of a process that analyses a tiny model: torch, transformers and their libraries."""

CUDA_CONTEXT = 500 * 10**6
"""Bytes that a CUDA context takes on the host, beside `RUNTIME`; on the device, the free memory already excludes it."""

FRAGMENTS = 0.2
"""Memory that the allocator of the host or the device loses to fragmentation, as a share of the activations' bytes."""

USABLE = 0.9
"""Share of the free memory that a run may be predicted to take."""

PREFETCHED = 2
"""Decoder layers that the streamed engine holds in memory: the current one and the next."""


@dataclass(frozen=True)
class Work:
    """What the memory of an analysis depends on, beside the model.

    Attributes:
        needs: What its observers need.
        samples: Calibration sequences N.
        seq_len: Tokens T of each.
        trial_samples: Sequences that removals are tried on.
        batch_size: Sequences that a forward-only pass computes at once.
        minibatch: Tokens of one minibatch of CKA.
        sums_on_host: Whether gradients are summed on the host although there is a device.
        scratch: Whether stored hidden states go to disk.
        compensation: Float64 matrices that the compensation holds, ``[hidden, hidden]``; ``None`` without one.
        of_inputs: Whether they are as wide as the MLP's hidden layer instead.
        refined_sequences: Sequences that the compensation computes gradients of at once; 0 where it computes none.
        protected: Layers at the front that stay: what is refined begins with the layer before the first cut.
        removed: Layers that are removed, or their share if below 1.
        whole_on_host: Whether a resident model is in host memory as a whole before it is moved to a device, as all but
            safetensors are.
    """

    needs: Need
    samples: int
    seq_len: int
    trial_samples: int
    batch_size: int = 8
    minibatch: int = 512
    sums_on_host: bool = False
    scratch: bool = False
    compensation: int | None = None
    of_inputs: bool = False
    refined_sequences: int = 0
    protected: int = 0
    removed: float = 0
    whole_on_host: bool = False

    def refined(self, layers: int) -> int:
        """How many layers are refined at most: those behind the first possible cut and the one before it, less the removed."""
        gone = int(self.removed * layers) if self.removed < 1 else int(self.removed)
        return max(1, layers - max(self.protected - 1, 0) - gone)


def plan_memory(
    config: PretrainedConfig, dtype: torch.dtype, work: Work, on_device: bool, free: FreeMemory | None = None
) -> MemoryPlan:
    """Predicts the peak of an analysis with both engines; the export after it takes less.

    Args:
        config: The resolved configuration of a family with an adapter.
        dtype: The dtype of the computation.
        work: What the analysis does.
        on_device: Whether a CUDA device computes; the host then holds what need not be on the device.
        free: What is free. Steps with gradients take as many sequences as fit. On a device no more layers are refined, and no
            more hidden states stay there, than fit. ``None`` = enough.

    Raises:
        UserError: transformers cannot run such a configuration.
    """
    try:
        dry = dry_run(config, dtype)
        counts = count_parameters(dry.model, dry.layers)
        text = text_config(config)
        model = _Model(counts, len(dry.layers), text.hidden_size, text.vocab_size, dtype.itemsize)
        free = free or FreeMemory(None)
        step = _most_sequences(config, work, on_device)
        plans = [
            _with_step(step, free, partial(engine, dry, model, work, on_device, free))
            for engine in (_resident, _streamed)
        ]
        return MemoryPlan(*plans)
    except Exception as error:  # a configuration that fits no model fails anywhere in transformers or torch
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"the memory cannot be predicted: a model of this configuration does not run ({reason})"
        ) from None


def _most_sequences(config: PretrainedConfig, work: Work, on_device: bool) -> int:
    if Need.GRADIENTS in work.needs or adapter_of(config).active_experts_key is not None:
        return 1
    device = torch.device("cuda" if on_device else "cpu")
    return min(most_sequences(work.batch_size, work.seq_len, device), work.samples)


def _with_step(step: int, free: FreeMemory, predict: Callable[[int], EngineMemory]) -> EngineMemory:
    """The prediction for the largest step that fits: the given one, halved as often as need be."""
    memory = predict(step)
    while step > 1 and not fits(memory, free):
        step //= 2
        memory = predict(step)
    return replace(memory, step=step)


def fits(memory: EngineMemory, free: FreeMemory) -> bool:
    """Whether the predicted peaks are within `USABLE` of what is free; unknown free memory counts as enough."""
    pairs = [(memory.host_peak, free.host), (memory.device_peak or 0, free.device), (memory.disk, free.disk)]
    return all(there is None or needed <= USABLE * there for needed, there in pairs)


def choose_engine(plan: MemoryPlan, free: FreeMemory) -> str:
    """``resident`` when its predicted peak fits, otherwise ``streamed``."""
    return "resident" if fits(plan.resident, free) else "streamed"


@dataclass(frozen=True)
class _Model:
    counts: ParameterCounts
    layers: int
    hidden: int
    vocabulary: int
    itemsize: int

    def states(self, sequences: int, tokens: int) -> int:
        """Bytes of the hidden states between two layers."""
        return sequences * tokens * self.hidden * self.itemsize


def _resident(dry: DryRun, model: _Model, work: Work, on_device: bool, free: FreeMemory, step: int) -> EngineMemory:
    """The whole model; activations of one sequence in all layers, or of a batch in one; sums of gradients of all layers."""
    weights = model.counts.total * model.itemsize
    phases, stored = [{"weights": weights}], 0
    if _differentiates(work):
        one = dry.kept_for_backward(1, work.seq_len)
        # Gradients are freed one by one; their norms are taken in float32.
        gradient = model.counts.largest * (model.itemsize if model.itemsize == 4 else model.itemsize + 4)
        phases.append(
            {
                "weights": weights,
                "activations": _with_fragments(step * dry.kept_for_backward(model.layers, work.seq_len)),
                "loss": _with_fragments(step * (dry.training_peak(1, work.seq_len) - one)),
                "gradients": gradient + _sums(model.counts.matrices, work),
                "observed": _observed(model, work),
            }
        )
    elif Need.HIDDEN_STATES in work.needs:
        activations = dry.forward_peak(2, work.batch_size, work.seq_len)
        phases.append(
            {"weights": weights, "activations": _with_fragments(activations), "observed": _observed(model, work)}
        )
    if Need.TRIALS in work.needs:
        phases.append(
            {
                "weights": weights,
                "activations": _with_fragments(dry.forward_peak(2, 1, work.seq_len)),
                "hidden states": (model.layers + 2) * model.states(1, work.seq_len),
                "loss": _trial_logits(model, work.seq_len),
            }
        )
    if work.compensation is not None:
        phase = _compensation(dry, model, work, 2)
        stored = _streams(model, work)
        streams = {} if on_device else {"hidden states": stored}
        phases.append({"weights": weights, **phase, **streams})
        if work.refined_sequences:
            kept = work.refined_sequences * dry.kept_for_backward(work.refined(model.layers), work.seq_len)
            phases.append({"weights": weights, **_refinement(model, work, kept, weights, on_device, free), **streams})
    parts = max(phases, key=lambda phase: sum(phase.values()))
    # Safetensors are loaded to the device tensor by tensor.
    loaded = weights if work.whole_on_host else PREFETCHED * model.counts.largest * model.itemsize
    staged = {"weights": loaded} if on_device else {}
    if not on_device:
        return EngineMemory("resident", {**parts, "runtime": RUNTIME}, None, 0)
    return _on_device("resident", parts, staged, work, model, stored, free)


def _streamed(dry: DryRun, model: _Model, work: Work, on_device: bool, free: FreeMemory, step: int) -> EngineMemory:
    """Two layers, final norm and head; activations in one layer; hidden states of all sequences between layers."""
    counts = model.counts
    # On the host only the rows of the embedding that are looked up are read from the mapped file.
    looked_up = 0 if on_device else counts.embedding
    weights = (PREFETCHED * counts.layer + counts.outside - looked_up) * model.itemsize
    phases, stored = [{"weights": weights}], [0]
    every = model.states(work.samples, work.seq_len)
    if _differentiates(work):
        chunk = min(max(2, _loss_bytes(on_device) // (4 * model.vocabulary)), step * work.seq_len)
        kept = dry.kept_for_backward(1, work.seq_len)
        loss = dry.training_peak(1, chunk) - dry.kept_for_backward(1, chunk)
        gradient = counts.largest * model.itemsize if Need.GRADIENTS in work.needs else 0
        phases.append(
            {
                "weights": weights,
                "activations": _with_fragments(step * kept),
                "loss": _with_fragments(loss),
                "gradients": gradient + _sums(counts.layer_matrices, work),
                "observed": _observed(model, work),
            }
        )
        stored.append((model.layers + 2) * every)  # hidden states at L + 1 boundaries, and their gradient
    elif Need.HIDDEN_STATES in work.needs:
        activations = dry.forward_peak(1, work.batch_size, work.seq_len)
        phases.append(
            {"weights": weights, "activations": _with_fragments(activations), "observed": _observed(model, work)}
        )
        stored.append((model.layers + 1) * every)
    if Need.TRIALS in work.needs:
        phases.append(
            {
                "weights": weights,
                "activations": _with_fragments(dry.forward_peak(1, 1, work.seq_len)),
                "loss": _trial_logits(model, work.seq_len),
            }
        )
        # One set of hidden states per trial, that of the current model and that of the whole one.
        stored.append((model.layers + 2) * model.states(work.trial_samples, work.seq_len))
    if work.compensation is not None:
        phases.append({"weights": weights, **_compensation(dry, model, work, 1)})
        if work.refined_sequences:
            # One layer at a time is recomputed for its gradients, from the hidden states that entered it.
            kept = work.refined_sequences * dry.kept_for_backward(1, work.seq_len)
            kept += work.refined(model.layers) * model.states(work.refined_sequences, work.seq_len)
            phases.append({"weights": weights, **_refinement(model, work, kept, weights, on_device, free)})
        stored.append(_streams(model, work))
    parts = max(phases, key=lambda phase: sum(phase.values()))
    if on_device:
        staged = {"weights": PREFETCHED * counts.layer * model.itemsize}
        return _on_device("streamed", parts, staged, work, model, max(stored), free)
    waiting = {} if work.scratch or not max(stored) else {"hidden states": max(stored)}
    return EngineMemory("streamed", {**parts, **waiting, "runtime": RUNTIME}, None, max(stored) if work.scratch else 0)


def _on_device(
    engine: str,
    parts: dict[str, int],
    staged: dict[str, int],
    work: Work,
    model: _Model,
    stored: int,
    free: FreeMemory,
) -> EngineMemory:
    """What computes is on the device. Stored states are there while they fit; the host or the disk has room for all of them."""
    if work.sums_on_host and "gradients" in parts:
        sums = _sums(model.counts.matrices if engine == "resident" else model.counts.layer_matrices, work)
        parts = {**parts, "gradients": parts["gradients"] - sums}
        staged = {**staged, "gradients": sums}
    on_disk = work.scratch and engine == "streamed"
    kept = 0 if on_disk else _kept(parts, stored, free.device)
    if kept:
        parts = {**parts, "hidden states": parts.get("hidden states", 0) + kept}
    if stored and not on_disk:
        staged = {**staged, "hidden states": stored}
    host = {**staged, "runtime": RUNTIME + CUDA_CONTEXT}
    return EngineMemory(engine, host, parts, stored if on_disk else 0, state_bytes=kept)


def _kept(parts: dict[str, int], stored: int, free: int | None) -> int:
    """Bytes of stored states that stay on a device: no more than the engine would keep there, and than the rest leaves."""
    if free is None:
        return stored
    return max(0, min(stored, int(DEVICE_SHARE * (free - parts["weights"])), int(USABLE * free) - sum(parts.values())))


def _compensation(dry: DryRun, model: _Model, work: Work, layers: int) -> dict[str, int]:
    """Memory of a compensation beside the weights: activations of a batch in a layer, and the normal equations of one cut."""
    assert work.compensation is not None
    return {
        "activations": _with_fragments(dry.forward_peak(layers, work.batch_size, work.seq_len)),
        "equations": 8 * work.compensation * (model.counts.mlp_width if work.of_inputs else model.hidden) ** 2,
    }


def _refinement(
    model: _Model, work: Work, kept: int, weights: int, on_device: bool, free: FreeMemory
) -> dict[str, int]:
    """Memory of the refinement by gradient: the kept activations, a chunk of the divergence, and the refined weights.

    On the host each refined weight has five float32 numbers: value, gradient, Adam's two moments and the best value so far. On a
    device the best value is on the host, and the value is there in the model's dtype too; no more layers are refined than fit.
    """
    each = model.counts.refinable * work.refined(model.layers) // model.layers
    size = each * (REFINED_BYTES + model.itemsize if on_device else 5 * 4)
    if on_device and free.device is not None:
        one_layer = size // work.refined(model.layers)
        size = min(size, max(one_layer, int(MOVING_SHARE * (free.device - weights))))
    return {
        "activations": _with_fragments(kept),
        "loss": _with_fragments(5 * _loss_bytes(on_device)),
        "refined weights": size,
    }


def _loss_bytes(on_device: bool) -> int:
    """Bytes of float32 logits at once, where the loss is computed over chunks."""
    return DEVICE_CHUNK_BYTES if on_device else CHUNK_BYTES


def _streams(model: _Model, work: Work) -> int:
    """Five streams of hidden states: the whole model, and the shortened one with and without a repair, both at two depths."""
    return 5 * model.states(work.samples, work.seq_len)


def _differentiates(work: Work) -> bool:
    return bool(work.needs & Need.BACKWARD)


def _sums(matrices: int, work: Work) -> int:
    """Sums of gradients: one float32 number per weight, where an observer needs whole gradients."""
    return 4 * matrices if Need.GRADIENTS in work.needs else 0


def _observed(model: _Model, work: Work) -> int:
    """CKA's minibatch: the hidden states of each layer, in the model's dtype and in float64, and the kernel matrices."""
    if Need.HIDDEN_STATES not in work.needs:
        return 0
    tokens = min(work.minibatch, work.samples * work.seq_len)
    return model.layers * tokens * (model.hidden * (model.itemsize + 8) + 2 * 8 * tokens)


def _trial_logits(model: _Model, tokens: int) -> int:
    """Logits, and the five float32 copies that the divergence from the whole model (kl) needs; a loss alone needs fewer."""
    return tokens * model.vocabulary * (model.itemsize + 5 * 4)


def _with_fragments(size: int) -> int:
    return round((1 + FRAGMENTS) * size)
