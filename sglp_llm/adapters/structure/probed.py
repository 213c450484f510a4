"""What `tools/probe_families.py` has found of every causal type of one transformers release: a table, which it writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("probed.json")


@dataclass(frozen=True)
class Probed:
    """The table.

    Attributes:
        transformers: The release that was probed.
        types: By ``model_type``: ``adapter`` (``written``, ``derived`` or ``refused``), ``why`` where it is refused, and the
            outcomes of ``removals`` and ``analyses``: ``exact``, or ``refused: `` and why.
    """

    transformers: str
    types: Mapping[str, Mapping[str, Any]]

    def limits_of(self, model_type: str) -> str:
        """Why the type, or some removals of its layers, are refused; empty where nothing is."""
        found = self.types[model_type]
        reasons = [found["why"], *found["removals"]]
        return "; ".join(dict.fromkeys(each.removeprefix("refused: ") for each in reasons if each not in ("", "exact")))


def probed() -> Probed:
    """Reads the table; transformers is not imported."""
    data = json.loads(TABLE.read_text(encoding="utf-8"))
    return Probed(data["transformers"], data["types"])
