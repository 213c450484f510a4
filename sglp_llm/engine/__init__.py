"""Returns the loss of a pass, which shows observers hidden states, gradients and their norms. Start with `observer.py`.

`passes.py` runs a pass with `resident.py` (the whole model in memory) or `streamed.py` (one decoder layer at a time).
"""

from __future__ import annotations

from sglp_llm.engine.observer import Batch, Need, Observer
from sglp_llm.engine.passes import run_pass
from sglp_llm.engine.settings import PassSettings

__all__ = ["Batch", "Need", "Observer", "PassSettings", "run_pass"]
