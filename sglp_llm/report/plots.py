"""Plots; the only module that imports matplotlib (the extra ``report``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglp_llm.errors import UserError
from sglp_llm.records import Comparison, PrunePlan

_MARKERS = "osD^vP*Xd<>h"


def check_plotting() -> None:
    """Checks, before any work is done, that matplotlib is installed.

    Raises:
        UserError: It is not installed.
    """
    if not can_plot():
        raise UserError("plots need matplotlib: pip install 'sglp-llm[report]'")


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def plot_plan(plan: PrunePlan, folder: Path) -> list[Path]:
    """Writes ``cka.png``, the CKA matrix with segments and removed layers, and ``scores.png``, one panel per score.

    Returns:
        The files; only those for which the plan holds the numbers.
    """
    pyplot = _pyplot()
    files, removed = [], set(plan.removed)
    if plan.similarity is not None:
        figure, axis = pyplot.subplots(figsize=(6, 5))
        image = axis.imshow(plan.similarity.values.numpy(), vmin=0, vmax=1, cmap="viridis")
        for segment in plan.segments[1:]:
            axis.axhline(segment.start - 0.5, color="white")
            axis.axvline(segment.start - 0.5, color="white")
        axis.plot(plan.removed, plan.removed, "s", markerfacecolor="none", markeredgecolor="red")
        axis.set_xlabel("decoder layer")
        axis.set_ylabel("decoder layer")
        figure.colorbar(image, label="CKA")
        files.append(_saved(figure, folder / "cka.png"))
    if plan.scores:
        figure, axes = pyplot.subplots(len(plan.scores), 1, figsize=(7, 2.5 * len(plan.scores)), squeeze=False)
        for axis, (name, values) in zip(axes[:, 0], plan.scores.items(), strict=True):
            axis.plot(range(len(values)), values, color="lightgray", zorder=1)
            for gone, face, label in ((False, "tab:blue", "stays"), (True, "none", "removed")):
                layers = [layer for layer in range(len(values)) if (layer in removed) is gone]
                points = [values[layer] for layer in layers]
                axis.scatter(layers, points, edgecolors="tab:blue", facecolors=face, label=label, zorder=2)
            axis.set_ylabel(name)
            axis.grid(alpha=0.3)
        axes[0, 0].legend(fontsize="small")
        axes[-1, 0].set_xlabel("decoder layer")
        files.append(_saved(figure, folder / "scores.png"))
    return files


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _saved(figure: Any, file: Path) -> Path:
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    _pyplot().close(figure)
    return file


def plot_perplexity(comparison: Comparison, folder: Path) -> None:
    """Writes ``compare.png`` and ``compare.svg``: perplexity against the share of removed layers, one line per method.

    One panel for every measurement that gives a ``perplexity``; nothing is written when there is none.
    """
    names = [name for name, numbers in comparison.dense.items() if "perplexity" in numbers]
    if not names:
        return
    import matplotlib

    pyplot = _pyplot()
    matplotlib.rcParams["svg.hashsalt"] = "sglp-llm"  # the same comparison gives the same file
    figure, axes = pyplot.subplots(1, len(names), figsize=(6.5 * len(names), 4.5), squeeze=False)
    shades = matplotlib.colormaps["tab20"](range(20))
    colors = [*shades[::2], *shades[1::2]]  # the strong ones first
    methods = list(dict.fromkeys(row.method for row in comparison.rows))
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_prop_cycle(color=colors)
        for number, method in enumerate(methods):
            rows = sorted((row for row in comparison.rows if row.method == method), key=lambda row: row.ratio)
            ratios = [0.0, *(row.ratio for row in rows)]
            values = [comparison.dense[name]["perplexity"], *(row.results[name]["perplexity"] for row in rows)]
            axis.plot(ratios, values, label=method, marker=_MARKERS[number % len(_MARKERS)], linewidth=1.3)
        axis.set_yscale("log")
        axis.set_xlabel("share of decoder layers removed")
        axis.set_ylabel("perplexity")
        axis.set_title(name)
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize="small", bbox_to_anchor=(1.02, 1), loc="upper left", borderaxespad=0)
    figure.tight_layout()
    figure.savefig(folder / "compare.png", dpi=150)
    figure.savefig(folder / "compare.svg", metadata={"Date": None})
    pyplot.close(figure)
