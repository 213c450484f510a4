"""Whether all weights are finite, looked at once when they are loaded; and which layer's output is not, where something fails."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sglp_llm.errors import UserError

if TYPE_CHECKING:
    from sglp_llm.models.loading import DecoderModel

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_finite(name: str, layers: str, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuses weights with NaN or infinity among them; parameters that are not in memory are left out.

    Args:
        name: The model, for the message.
        layers: Where its decoder layers are, such as ``model.layers``.
        parameters: By their names in the model.

    Raises:
        UserError: A number is not finite; the message names the layer and the tensor.
    """
    found: dict[torch.device, list[tuple[str, torch.dtype, torch.Tensor]]] = defaultdict(list)
    for path, parameter in parameters:
        if parameter.is_meta or parameter.dtype not in _FLOATS or not parameter.numel():
            continue
        lowest, highest = torch.aminmax(parameter.detach())  # NaN is passed on; no temporary of the tensor's size
        found[parameter.device].append((path, parameter.dtype, torch.isfinite(lowest) & torch.isfinite(highest)))
    for looked_at in found.values():
        # Once for a device: moving a number to the host waits for all that the device has yet to do.
        are_finite = torch.stack([verdict for _, _, verdict in looked_at]).tolist()
        if all(are_finite):
            continue
        path, dtype, _ = looked_at[are_finite.index(False)]
        match = re.match(rf"{re.escape(layers)}\.(\d+)\.", path)
        place = f"of decoder layer {match[1]}" if match else "outside the decoder layers"
        narrow = dtype in (torch.float16, torch.bfloat16)
        hint = f", or {str(dtype)[6:]} is too small for them (try --dtype float32)" if narrow else ""
        raise UserError(
            f"{name}: tensor {path!r} {place} holds numbers that are not finite: the weights are damaged{hint}"
        )


def first_not_finite(model: DecoderModel, input_ids: torch.Tensor) -> int | None:
    """The first decoder layer whose output holds a number that is not finite, on any of the sequences; ``None`` if there is none.

    Args:
        model: The model, resident or streamed; whatever is in effect, such as skipped layers, stays so.
        input_ids: ``[sequences, tokens]`` int64.
    """
    broken: set[int] = set()

    def watch(index: int, output: Any) -> None:
        leaving = output[0] if isinstance(output, tuple | list) else output
        if not bool(leaving.isfinite().all()):
            broken.add(index)

    handles = [
        layer.register_forward_hook(lambda _module, _args, output, index=index: watch(index, output))
        for index, layer in enumerate(model.layers)
    ]
    try:
        with torch.no_grad():
            for ids in input_ids.split(1):
                model.model(input_ids=ids.to(model.input_device), use_cache=False)
                if broken:
                    return min(broken)
    finally:
        for handle in handles:
            handle.remove()
    return None


@contextmanager
def naming_layers(load: Callable[[], DecoderModel], input_ids: torch.Tensor) -> Iterator[None]:
    """Inside the block, what anything makes of an output that is not finite becomes an error that names the layer.

    Nothing is looked at before something fails: solvers of other packages refuse such numbers in their own words, and a score
    of one layer is not finite because another layer's output is not.

    Args:
        load: Returns the model, which is in memory where something that failed has used it.
        input_ids: ``[sequences, tokens]``: what it was run on.

    Raises:
        UserError: A layer's output is not finite.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or (
            isinstance(error, UserError) and "not finite" not in str(error)
        ):
            raise
        model = load()
        layer = first_not_finite(model, input_ids)
        if layer is None or f"decoder layer {layer} " in str(error):
            raise
        raise output_not_finite(model, layer) from error


def output_not_finite(model: DecoderModel, layer: int | None) -> UserError:
    """The error for the first layer whose output is not finite; ``None`` where only the head's is."""
    place = "the logits are not finite" if layer is None else f"the output of decoder layer {layer} is not finite"
    dtype = str(model.model.dtype).removeprefix("torch.")
    return UserError(f"{place}, though all weights are: {dtype} is too small for this model (try --dtype float32)")
