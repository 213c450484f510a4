"""Plots; the only module that imports matplotlib (the extra ``report``)."""

from __future__ import annotations

from pathlib import Path

from sglp_llm.errors import UserError
from sglp_llm.records import Comparison

_MARKERS = "osD^vP*Xd<>h"


def check_plotting() -> None:
    """Checks, before any work is done, that matplotlib is installed.

    Raises:
        UserError: It is not installed.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib: pip install 'sglp-llm[report]'")


def plot_perplexity(comparison: Comparison, folder: Path) -> None:
    """Writes ``compare.png`` and ``compare.svg``: perplexity against the share of removed layers, one line per method.

    One panel for every measurement that gives a ``perplexity``; nothing is written when there is none.
    """
    names = [name for name, numbers in comparison.dense.items() if "perplexity" in numbers]
    if not names:
        return
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "sglp-llm"  # the same comparison gives the same file
    from matplotlib import pyplot

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
