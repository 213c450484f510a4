"""Results of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EvalResult:
    """Perplexity of a model, with everything that is needed to compare it with another.

    Attributes:
        dataset: Where the text came from.
        window: Tokens in one non-overlapping window, the BOS token included where there is one.
        windows: How many windows were scored.
        bos: Whether every window began with a BOS token.
        tokens: Number of tokens that were predicted.
        mean_nll: Mean negative log-likelihood in nats per token.
        nll_standard_error: Standard error of ``mean_nll``, over windows.
        perplexity: ``exp(mean_nll)``.
        perplexity_standard_error: ``perplexity * nll_standard_error`` (delta method).
    """

    dataset: str
    window: int
    windows: int
    bos: bool
    tokens: int
    mean_nll: float
    nll_standard_error: float
    perplexity: float
    perplexity_standard_error: float


@dataclass(frozen=True)
class TaskScore:
    """One score of a model.

    Attributes:
        task: The task, group of tasks or data set.
        metric: Name of the metric, such as ``acc_norm``.
        value: The number.
        stderr: Its standard error; ``None`` where there is none.
        higher_is_better: Whether a higher value is better: true of accuracy, not of perplexity.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
