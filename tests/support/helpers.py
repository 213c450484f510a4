"""Helpers shared by several test files."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
"""The repository."""

TEXT = f"text:{ROOT / 'LICENSE'}"
"""Calibration text that is the same with every Python: what ``pydoc`` holds is not."""

MERGES = (
    "Ġ t,h e,Ġ a,i n,r e,o n,Ġt he,e r,Ġ s,a t,Ġ o,e n,Ġ c,i t,i s,Ġ w,o r,a n,Ġ b,Ġ f,e s,Ġ p,in g,o u,Ġa n,a l,a r,"
    "Ġt o,Ġo f,e d,Ġ m,Ġ in,Ġ d,Ġan d,i c,l e,Ġ is,Ġ h,r o,Ċ Ċ,a s"
)


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens that encodes any text, with ``<s>`` in front where ``bos`` is true.

    Its ids: 0 ``<s>``, 1 ``</s>``, 2 ``<pad>``, then the 256 bytes and 41 merges. Without ``bos`` it has no BOS token.
    """
    merges = [tuple(merge.split(" ")) for merge in MERGES.split(",")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", "<pad>", *alphabet, *map("".join, merges)]
    tokenizer = Tokenizer(BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=64,
    )


def comparison_pieces(folder: Path) -> list[Path]:
    """The journal files of a comparison: its layer selections and its measured numbers."""
    return [*folder.glob("journal/*.json"), *folder.glob("measured/*.json")]
