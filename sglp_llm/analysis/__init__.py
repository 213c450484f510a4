"""Returns an `Analysis`: which layers to remove from a model, and why. Start with `run.py`.

`opening.py` opens the model and chooses the engine, `observing.py` runs the pass and the trials, `decisions.py` chooses layers
and compensates for them.
"""

from __future__ import annotations

from sglp_llm.analysis.opening import open_for_analysis, open_model
from sglp_llm.analysis.run import plan_settings, run_analysis, software_versions

__all__ = ["open_for_analysis", "open_model", "plan_settings", "run_analysis", "software_versions"]
