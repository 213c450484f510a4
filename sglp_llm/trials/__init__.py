"""Returns what a model computes without some of its layers, for many sets of layers. Start with `trials.py`.

`observer.py` is the observer interface, `measures.py` what is measured, `costs.py` the cost of sets on a growing number of
sequences; `journal.py` stores finished work on disk.
"""

from __future__ import annotations

from sglp_llm.trials.journal import Journal
from sglp_llm.trials.observer import Removed, TrialObserver
from sglp_llm.trials.trials import Trials

__all__ = ["Journal", "Removed", "TrialObserver", "Trials"]
