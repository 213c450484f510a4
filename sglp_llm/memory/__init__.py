"""Returns predictions: the peak memory of a run with either engine, and what is free. Start with `prediction.py`."""

from __future__ import annotations

from sglp_llm.memory.records import EngineMemory, FreeMemory, MemoryPlan

__all__ = ["EngineMemory", "FreeMemory", "MemoryPlan"]
