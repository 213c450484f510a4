"""Hidden states of training sequences that are seen again: what no step changes is computed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sglp_llm.engine.modes import forwards_replaced, leaving_states

REMEMBERED_BYTES = 512 * 2**20
"""Most that the hidden states of one model take in the host's memory; sequences beyond it are computed again."""


class Remembered:
    """Hidden states ``[tokens, hidden]`` by the number of the sequence, on the host."""

    def __init__(self, sequences: Iterable[int] = ()) -> None:
        self._wanted, self._states = frozenset(sequences), dict[int, Tensor]()

    def wants(self, sequences: Sequence[int]) -> bool:
        """Whether all of them will be seen again with the same tokens."""
        return self._wanted.issuperset(sequences)

    def get(self, sequences: Sequence[int], device: torch.device) -> Tensor | None:
        """``[batch, tokens, hidden]`` on the device, where all of them are known."""
        if not self._states.keys() >= set(sequences):
            return None
        return torch.stack([self._states[number] for number in sequences]).to(device)

    def put(self, sequences: Sequence[int], states: Tensor) -> None:
        """Keeps ``[batch, tokens, hidden]`` while there is room."""
        size = states[0].numel() * states.element_size()
        if size * (len(self._states) + len(sequences)) <= REMEMBERED_BYTES:
            self._states |= dict(zip(sequences, states.detach().cpu(), strict=True))


class FrozenFront:
    """Decoder layers that run once for every sequence that is seen again.

    Args:
        layers: The first layers of the student; see `Trained.front`.
        sequences: Those that are seen again with the same tokens.
    """

    def __init__(self, layers: Sequence[nn.Module], sequences: Iterable[int]) -> None:
        self._layers, self._remembered = layers, Remembered(sequences)

    @contextmanager
    def of(self, sequences: Sequence[int], device: torch.device) -> Iterator[None]:
        """Inside the block a forward pass over these sequences starts behind these layers, where it can."""
        with ExitStack() as stack:
            if self._layers and self._remembered.wants(sequences):
                states = self._remembered.get(sequences, device)
                if states is not None:
                    stack.enter_context(
                        forwards_replaced(self._layers, [lambda args, kwargs: states] * len(self._layers))
                    )
                else:

                    def keep(module: Any, args: Any, output: Any) -> None:
                        self._remembered.put(sequences, leaving_states(output))

                    stack.callback(self._layers[-1].register_forward_hook(keep).remove)
            yield
