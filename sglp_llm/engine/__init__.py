"""Returns what a pass over the calibration set shows: hidden states, gradients and their norms. Start with `observer.py`.

`passes.py` runs a pass, by `resident.py` (the whole model in memory) or by `streamed.py` (one decoder layer at a time).
"""

from __future__ import annotations

from sglp_llm.engine.observer import Batch, Need, Observer
from sglp_llm.engine.passes import run_pass
from sglp_llm.engine.settings import PassSettings

__all__ = ["Batch", "Need", "Observer", "PassSettings", "run_pass"]
