"""Hidden states around every decoder layer, recorded by plain hooks, and CKA of them in plain loops."""

from __future__ import annotations

import torch
from calibration_sets import ids_and_mask
from torch import nn

from sglp_llm.calibration import CalibrationSet
from sglp_llm.models.loading import DecoderModel


def states_around(model: DecoderModel, calibration: CalibrationSet) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Input and output of each layer for each sequence, run alone: real tokens only, each ``[tokens, hidden]``."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(
        module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], output: object
    ) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        leaving = output[0] if isinstance(output, tuple) else output
        assert isinstance(leaving, torch.Tensor)
        seen.append((entering[0], leaving[0]))

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in model.layers]
    result = []
    for ids, mask in zip(calibration.input_ids, calibration.mask, strict=True):
        with torch.no_grad():
            model.model(**ids_and_mask(ids, mask), use_cache=False)
        result.append([(entering[mask], leaving[mask]) for entering, leaving in seen])
        seen.clear()
    for handle in handles:
        handle.remove()
    return result


def hsic(first: torch.Tensor, second: torch.Tensor) -> float:
    """The unbiased estimator, written out with ones: ``first`` and ``second`` are kernel matrices."""
    n = len(first)
    k, m = (matrix - torch.diag(matrix.diagonal()) for matrix in (first, second))
    one = torch.ones(n, 1, dtype=torch.float64)
    terms = (k @ m).trace() + (one.T @ k @ one) * (one.T @ m @ one) / ((n - 1) * (n - 2))
    return float((terms - 2 * (one.T @ k @ m @ one) / (n - 2)) / (n * (n - 3)))


def cka_by_hand(
    states: list[list[tuple[torch.Tensor, torch.Tensor]]], kernel: str, sequences: int, positions: int
) -> torch.Tensor:
    """Minibatches of consecutive sequences, position ``floor(i * T / m)`` of each; a smaller last minibatch."""
    depth = len(states[0])
    sums, minibatches = torch.zeros(depth, depth, dtype=torch.float64), 0
    for first in range(0, len(states), sequences):
        kernels = []
        for layer in range(depth):
            rows = []
            for sequence in states[first : first + sequences]:
                leaving = sequence[layer][1]
                m = min(positions, len(leaving))
                rows += [leaving[(i * len(leaving)) // m].double() for i in range(m)]
            x = torch.stack(rows)
            if kernel == "cosine":
                x = x / x.norm(dim=1, keepdim=True)
            kernels.append(x @ x.T)
        sums += torch.tensor([[hsic(k, m) for m in kernels] for k in kernels], dtype=torch.float64)
        minibatches += 1
    mean = sums / minibatches
    return mean / torch.sqrt(torch.outer(mean.diagonal(), mean.diagonal()))
