"""The losses of a training over its steps, as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def plot_losses(log: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Writes ``loss.png`` and ``loss.svg``: the training loss and the held-out losses; nothing without matplotlib.

    Args:
        log: Records with ``step`` and ``loss``, or ``step`` and ``eval_...``.
        folder: Where the files go.
    """
    if find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "sglp-llm"  # the same run gives the same file
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 4.5))
    for name, label in (
        ("loss", "training"),
        ("eval_loss", "held out"),
        ("eval_next_token_loss", "held out, next token"),
    ):
        points = [(line["step"], line[name]) for line in log if name in line]
        if points and not (name == "eval_next_token_loss" and _same(log)):
            axis.plot(*zip(*points, strict=True), label=label, marker="" if name == "loss" else "o", linewidth=1.3)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("nats a token")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=150)
    figure.savefig(folder / "loss.svg", metadata={"Date": None})
    pyplot.close(figure)


def _same(log: Sequence[Mapping[str, Any]]) -> bool:
    """Whether what is minimised is the next-token loss itself."""
    return all(line["eval_loss"] == line["eval_next_token_loss"] for line in log if "eval_loss" in line)
