"""Returns an opened model: a Hub id, folder, GGUF file or live model, with its weights and tokenizer. Start with `opened.py`.

`source.py` finds and checks a checkpoint, `loading.py` loads it into memory, `layer_weights.py` one decoder layer at a time.
"""

from __future__ import annotations

# Nothing here imports torch: an export needs the source, but no model.
from sglp_llm.models.source import Source, find_config, find_source

__all__ = ["Source", "find_config", "find_source"]
