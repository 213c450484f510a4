"""Sums of numbers of every layer that stay where the layers are until the end of a pass."""

from __future__ import annotations

import torch


class LayerTotals:
    """One float64 number, or a few, for every layer, each on the device of its layer.

    Moving a number to the host waits for everything that the device has yet to do; here that happens once a device.

    Args:
        num_layers: Number of layers.
    """

    def __init__(self, num_layers: int) -> None:
        self._sums: list[torch.Tensor | None] = [None] * num_layers

    def add(self, layer: int, value: torch.Tensor) -> None:
        """Adds a float64 scalar to a layer's sum."""
        known = self._sums[layer]
        self._sums[layer] = value if known is None else known + value

    def on_host(self) -> torch.Tensor:
        """``[layers]`` float64 on the CPU; 0 for layers that nothing was added to."""
        totals = torch.zeros(len(self._sums), dtype=torch.float64)
        present = {index: each for index, each in enumerate(self._sums) if each is not None}
        for device in {each.device for each in present.values()}:
            here = [index for index, each in present.items() if each.device == device]
            totals[here] = torch.stack([present[index] for index in here]).cpu()
        return totals
