"""What a criterion is: an observer of the engine's pass that ends with one score a decoder layer."""

from __future__ import annotations

from abc import abstractmethod

from sglp_llm.engine.observer import Observer


class Criterion(Observer):
    """Judges the decoder layers. It says what it needs, watches one pass, and is asked for its scores afterwards.

    Args:
        num_layers: Number of decoder layers L.
        seed: Of anything that is drawn.
    """

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        self.num_layers = num_layers
        self.seed = seed

    @abstractmethod
    def scores(self) -> list[float]:
        """One number a layer, length L; larger = keep."""
