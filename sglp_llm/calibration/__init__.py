"""Returns token sequences: calibration sets, evaluation windows, training sequences. Start with `sequences.py`.

`texts.py` reads the documents that they are made of, `chat.py` conversations; `mixtures.py` shares between several sources, and
`packing.py` joins and cuts. `self_text.py` lets a model write. `default_text.py` is for runs that name no text.
"""

from __future__ import annotations

from sglp_llm.calibration.default_text import AUTO, named_text
from sglp_llm.calibration.mixtures import Portion, Spec, mixture
from sglp_llm.calibration.parts import Parts, split
from sglp_llm.calibration.sequences import CalibrationSet, EvaluationWindows, calibration_set, evaluation_windows
from sglp_llm.calibration.texts import check_spec, load_documents
from sglp_llm.calibration.training import TrainingSequences, training_sequences

__all__ = [
    "AUTO",
    "CalibrationSet",
    "EvaluationWindows",
    "Parts",
    "Portion",
    "Spec",
    "TrainingSequences",
    "calibration_set",
    "check_spec",
    "evaluation_windows",
    "load_documents",
    "mixture",
    "named_text",
    "split",
    "training_sequences",
]
