"""Whether all weights are finite: looked at once when they are loaded, whatever is done with them afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from sglp_llm.errors import UserError

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
    for path, parameter in parameters:
        if parameter.is_meta or parameter.dtype not in _FLOATS or not parameter.numel():
            continue
        lowest, highest = torch.aminmax(parameter.detach())  # NaN is passed on; no temporary of the tensor's size
        if bool(torch.isfinite(lowest) and torch.isfinite(highest)):
            continue
        match = re.match(rf"{re.escape(layers)}\.(\d+)\.", path)
        place = f"of decoder layer {match[1]}" if match else "outside the decoder layers"
        narrow = parameter.dtype in (torch.float16, torch.bfloat16)
        hint = f", or {str(parameter.dtype)[6:]} is too small for them (try --dtype float32)" if narrow else ""
        raise UserError(
            f"{name}: tensor {path!r} {place} holds numbers that are not finite: the weights are damaged{hint}"
        )
