"""Returns token sequences: calibration sets, and evaluation windows. Start with `sequences.py`.

`texts.py` reads the documents that they are made of.
"""

from __future__ import annotations

from sglp_llm.calibration.mixtures import Portion, Spec, mixture
from sglp_llm.calibration.parts import Parts, split
from sglp_llm.calibration.sequences import CalibrationSet, EvaluationWindows, calibration_set, evaluation_windows
from sglp_llm.calibration.texts import check_spec, load_documents

__all__ = [
    "CalibrationSet",
    "EvaluationWindows",
    "Parts",
    "Portion",
    "Spec",
    "calibration_set",
    "check_spec",
    "evaluation_windows",
    "load_documents",
    "mixture",
    "split",
]
