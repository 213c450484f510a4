"""The reload check: the exported model computes what the source does with the layers skipped and the weights replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from sglp_llm.adapters import adapter_of, auto_class
from sglp_llm.adapters.structure.empty import without_weights
from sglp_llm.checkpoint.export import renamed
from sglp_llm.engine.modes import replaced_weights, skipped
from sglp_llm.errors import UserError
from sglp_llm.models import find_source
from sglp_llm.models.finite import first_not_finite, output_not_finite
from sglp_llm.models.loading import DecoderModel, load_streamed
from sglp_llm.models.modes import evaluating

HALF_PRECISION_TOLERANCE = 0.02
"""Largest difference of logits in bfloat16 and float16, relative to the largest logit. In float32 they must be equal."""

CHECK_SEQUENCES, CHECK_TOKENS = 2, 128
"""What is compared: the first tokens of the first sequences."""

_PROMPT_TOKENS = 16
_NEW_TOKENS = 16
# Two tokens whose logits are this close, relative to the largest, are a tie that rounding may break either way.
_TIE = 1e-4
# Recurrent layers compute a prompt in chunks and new tokens one by one, and round differently.
_TIE_OF_DERIVED = 2e-3


class VerificationError(RuntimeError):
    """The exported checkpoint does not compute what it should: a bug of this program, never the user's mistake."""


@dataclass(frozen=True)
class Expected:
    """What the shortened model must compute.

    Attributes:
        input_ids: ``[sequences, tokens]`` int64.
        logits: ``[sequences, tokens, vocabulary]`` of the source with the removed layers skipped and the plan's weights in place.
        generates: Whether greedy generation of the whole source gives the same tokens with the cache as without. Compared with
            a derived adapter alone, since the cache of some types is approximate.
        unused_tensors: Names in the export of tensors that transformers already ignored in the source.
    """

    input_ids: torch.Tensor
    logits: torch.Tensor
    unused_tensors: frozenset[str] = frozenset()
    generates: bool = True


@dataclass(frozen=True)
class Verification:
    """The result of the reload check.

    Attributes:
        dtype: The dtype in which both models computed.
        max_difference: Largest absolute difference of two logits.
        tolerance: The largest allowed difference; 0 in float32.
        tokens: Number of positions that were compared.
        generation: Whether generation with the KV cache was compared with generation without (float32 only, and where the
            source's own agree).
    """

    dtype: str
    max_difference: float
    tolerance: float
    tokens: int
    generation: bool


def expected_logits(
    model: DecoderModel,
    removed: tuple[int, ...],
    input_ids: torch.Tensor,
    replaced: Mapping[str, torch.Tensor] | None = None,
) -> Expected:
    """Runs the source with the removed layers skipped on the first tokens of two sequences.

    Args:
        model: The whole model.
        removed: Original indices of the layers to skip.
        input_ids: ``[sequences, tokens]`` int64, for instance the calibration set's.
        replaced: A plan's replaced tensors, rounded as the export stores them (`as_stored`).

    Raises:
        UserError: A logit is not finite, so that there is nothing to compare with; the message names the first such layer.
    """
    ids = input_ids[:CHECK_SEQUENCES, :CHECK_TOKENS].to(model.input_device)
    kept = [layer for layer in range(model.num_layers) if layer not in removed]
    with (
        evaluating(model.model),
        replaced_weights(model, replaced or {}),
        skipped(model.layers, removed),
        _buffers_as_loaded(model.model),
    ):
        logits = _logits(model.model, ids)
        if not bool(logits.isfinite().all()):
            raise output_not_finite(model, first_not_finite(model, ids))
    unused = (renamed(tensor, model.adapter, kept) for tensor in model.unused_tensors)
    return Expected(ids.cpu(), logits, frozenset(name for name in unused if name), _generates(model, ids))


def _generates(model: DecoderModel, ids: torch.Tensor) -> bool:
    if not model.adapter.is_derived or model.weights is not None or model.model.dtype != torch.float32:
        return True
    try:
        with evaluating(model.model):
            _compare_generation(model.model, ids[:, :_PROMPT_TOKENS], _TIE_OF_DERIVED)
    except Exception:  # whatever a type's own code raises: it does not generate unpruned either
        return False
    return True


def verify_checkpoint(
    folder: Path,
    expected: Expected,
    dtype: torch.dtype,
    device: torch.device | str,
    streamed: bool = False,
    config: PretrainedConfig | None = None,
) -> Verification:
    """Loads the folder with plain transformers and compares it with what is expected.

    Args:
        folder: The exported checkpoint: a folder, or a GGUF file.
        expected: What `expected_logits` returned.
        dtype: The dtype in which the source computed.
        device: Where the source computed, or accelerate's ``device_map``.
        streamed: Keep one decoder layer in memory at a time, loaded by transformers' loader. Generation is then not compared: it
            would read the whole checkpoint for every token.
        config: Used instead of what transformers derives from a GGUF file.

    Raises:
        VerificationError: The folder does not load, tensors are missing or unexpected, logits differ, or in float32 greedy
            generation with the KV cache gives other tokens than without.
    """
    model = _streamed(folder, dtype) if streamed else _resident(folder, dtype, device, config)
    ids = expected.input_ids.to(model.input_device)
    logits = _logits(model.model, ids)
    if unknown := sorted(model.unused_tensors - expected.unused_tensors):
        raise VerificationError(f"reload check: unexpected keys in {folder}: {unknown[:3]}")
    difference = float((logits - expected.logits).abs().max())
    exact = dtype == torch.float32
    tolerance = 0.0 if exact else HALF_PRECISION_TOLERANCE * float(expected.logits.abs().max())
    if not difference <= tolerance:  # written so that NaN fails
        raise VerificationError(
            f"reload check: the logits of {folder} differ from the source's with the layers skipped "
            f"by {difference:g} (allowed: {tolerance:g})"
        )
    generation = exact and not streamed and expected.generates
    if generation:
        tie = _TIE_OF_DERIVED if model.adapter.is_derived else _TIE
        _compare_generation(model.model, ids[:, :_PROMPT_TOKENS], tie)
    return Verification(str(dtype).removeprefix("torch."), difference, tolerance, ids.numel(), generation)


def _resident(
    folder: Path, dtype: torch.dtype, device: torch.device | str, config: PretrainedConfig | None
) -> DecoderModel:
    where: Path = folder
    options: dict[str, Any] = {"trust_remote_code": False}
    if folder.is_file():
        where, options = folder.parent, {**options, "gguf_file": folder.name}
    try:
        found = config or AutoConfig.from_pretrained(where, **options)
        model, report = auto_class(found).from_pretrained(
            where, config=found, dtype=dtype, device_map=device, output_loading_info=True, **options
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, safetensors and huggingface_hub each have their own for what is wrong
        raise _does_not_load(folder, error) from error
    for complaint in ("missing_keys", "mismatched_keys"):
        if keys := set(report[complaint]):
            raise VerificationError(f"reload check: {complaint.replace('_', ' ')} in {folder}: {sorted(keys)[:3]}")
    return DecoderModel(model.eval(), adapter_of(model.config), frozenset(report["unexpected_keys"]))


def _streamed(folder: Path, dtype: torch.dtype) -> DecoderModel:
    try:
        return load_streamed(find_source(folder), str(dtype).removeprefix("torch."))
    except UserError as error:
        raise _does_not_load(folder, error) from error


def _does_not_load(folder: Path, error: Exception) -> VerificationError:
    return VerificationError(f"reload check: {folder} does not load ({' '.join(str(error).split())[:300]})")


@contextmanager
def _buffers_as_loaded(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the non-persistent buffers have the values that a reloaded model will have.

    ``model.to(torch.bfloat16)`` rounds the rotary frequencies too, which transformers keeps in float32 on loading; the
    logits then differ by several percent although the weights are the same.
    """
    coarse = [
        (f"{prefix}.{name}", module, name, buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set and buffer.is_floating_point() and buffer.dtype != torch.float32
    ]
    if coarse:
        with without_weights():
            fresh = dict(auto_class(model.config).from_config(model.config, dtype=model.dtype).named_buffers())
        for path, module, name, buffer in coarse:
            module._buffers[name] = fresh[path].to(buffer.device)
    try:
        yield
    finally:
        for _, module, name, buffer in coarse:
            module._buffers[name] = buffer


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float().cpu()


def _compare_generation(model: PreTrainedModel, prompts: torch.Tensor, tie: float) -> None:
    for prompt in prompts:
        cached, plain = (_greedy(model, prompt[None], use_cache) for use_cache in (True, False))
        if torch.equal(cached, plain):
            continue
        same = int((cached[: len(plain)] == plain[: len(cached)]).long().cumprod(0).sum())
        top = _logits(model, plain[None, :same])[0, -1].topk(2).values
        if top[0] - top[1] > tie * top[0].abs():
            raise VerificationError(
                f"reload check: generation with the KV cache differs from generation without at token {same}"
            )


def _greedy(model: PreTrainedModel, prompt: torch.Tensor, use_cache: bool) -> torch.Tensor:
    """Without the checkpoint's own generation settings, which may be any: some need a tokenizer, or code from the Hub."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=_NEW_TOKENS, do_sample=False, use_cache=use_cache, pad_token_id=0
    )
    try:
        tokens: torch.Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt))[0]
    finally:
        model.generation_config = own
    return tokens
