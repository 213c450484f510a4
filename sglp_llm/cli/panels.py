"""The panels that a verb's help is divided into, in the order in which they are shown."""

from __future__ import annotations

BUDGET = "Budget (how much to remove)"
METHOD = "Method (which layers go)"
SEGMENTS = "Segments (of methods that compare inside them)"
SEARCH = "Search (of methods that try removals)"
MEASURED = "What is measured"
DRAFT = "Draft model (with --draft-for)"
CALIBRATION = "Calibration"
REPAIR = "Repair"
TEACHER = "Teacher and loss"
TRAINED = "What is trained"
TEXT = "Text and length"
STEPS = "Steps"
MEMORY = "Memory and numbers"
MODEL = "Model"
HUB = "Hub"
OUTPUT = "Output"

ORDER = (
    "Arguments",
    BUDGET,
    METHOD,
    SEGMENTS,
    SEARCH,
    MEASURED,
    DRAFT,
    CALIBRATION,
    REPAIR,
    TEACHER,
    TRAINED,
    TEXT,
    STEPS,
    MEMORY,
    MODEL,
    HUB,
    OUTPUT,
)
"""Options without a panel are shown in the last one."""

PRUNE = "Make a model shorter"
MEASURE = "Measure"
HAND_ON = "Hand on"
LOOK_UP = "Look up"
