"""Minibatch centered kernel alignment (CKA) between the outputs of every pair of decoder layers.

Kornblith et al. 2019 (CKA), Song et al. 2012 (the unbiased HSIC estimator), Nguyen, Raghu & Kornblith 2021 (averaging HSIC
over minibatches). The cosine kernel is our choice, not the paper's: with a linear kernel an LLM's massive activations (the norm
at the first position is hundreds of times larger than elsewhere) dominate the Gram matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglp_llm.errors import UserError, unknown
from sglp_llm.method.exact import exact
from sglp_llm.processes import Processes
from sglp_llm.records import SimilarityMatrix

KERNELS = ("cosine", "linear")

# A self-similarity this small, relative to the terms that it is the difference of, is rounding error.
_CANCELLED = 1e-12


def check_kernel(kernel: str) -> str:
    """Returns the kernel's name if it is valid.

    Raises:
        UserError: It is not one of `KERNELS`.
    """
    if kernel not in KERNELS:
        raise unknown("CKA kernel", kernel, KERNELS)
    return kernel


def gram_matrix(rows: torch.Tensor, kernel: str) -> torch.Tensor:
    """The kernel matrix with its diagonal set to zero.

    Args:
        rows: ``[n, hidden]`` representations of n tokens, any float dtype.
        kernel: ``"linear"`` for x x^T; ``"cosine"`` for the same with every row first scaled to unit norm.

    Returns:
        ``[n, n]`` float64.
    """
    rows = exact(rows)
    if kernel == "cosine":
        rows = torch.nn.functional.normalize(rows, dim=1)
    gram = rows @ rows.T
    gram.fill_diagonal_(0)
    return gram


def hsic_matrix(grams: torch.Tensor) -> torch.Tensor:
    """Unbiased HSIC (HSIC1 of Song et al. 2012) between every pair of kernel matrices.

    Args:
        grams: ``[layers, n, n]`` float64, symmetric, with zero diagonals; n >= 4.

    Returns:
        ``[layers, layers]`` float64.
    """
    layers, n, _ = grams.shape
    flat = grams.reshape(layers, n * n)
    row_sums = grams.sum(dim=2)  # K'1  [layers, n]
    totals = row_sums.sum(dim=1)  # 1'K'1  [layers]
    traces = flat @ flat.T  # tr(K'M'), both symmetric
    return (traces + torch.outer(totals, totals) / ((n - 1) * (n - 2)) - 2 * (row_sums @ row_sums.T) / (n - 2)) / (
        n * (n - 3)
    )


class CKAAccumulator:
    """Accumulates CKA over minibatches. Memory is the kernel matrices of one minibatch, however many there are."""

    def __init__(self, kernel: str = "cosine") -> None:
        self.kernel = check_kernel(kernel)
        self._sum = torch.zeros((), dtype=torch.float64)
        self._scale = torch.zeros((), dtype=torch.float64)  # magnitude of the terms of the self-similarities
        self._minibatches = 0

    def update(self, representations: Sequence[torch.Tensor]) -> None:
        """Adds one minibatch.

        Args:
            representations: One ``[n, hidden]`` tensor per layer, for the same n tokens. They may be on different devices and
                have different widths; each kernel matrix is computed on its tensor's device.

        Raises:
            UserError: Fewer than 4 tokens (the estimator needs n >= 4), or a layer's output is not finite.
        """
        if representations[0].shape[0] < 4:
            raise UserError(
                f"CKA needs at least 4 tokens a minibatch, not {representations[0].shape[0]}: use longer sequences"
            )
        each = [gram_matrix(rows, self.kernel) for rows in representations]
        grams = torch.stack([gram.to(each[0].device) for gram in each])
        hsic, scale = hsic_matrix(grams).cpu(), grams.square().mean(dim=(1, 2)).cpu()
        for layer in range(len(representations)):
            if not torch.isfinite(hsic[layer, layer]):
                raise UserError(
                    f"the output of decoder layer {layer} is not finite: are the weights damaged, or is the dtype too small?"
                )
        self._sum = self._sum + hsic
        self._scale = self._scale + scale
        self._minibatches += 1

    def gather(self, num_layers: int, processes: Processes) -> None:
        """Sums over the minibatches of all processes; a collective call. This process may have seen none.

        Args:
            num_layers: Number of representations per minibatch, the same in every process.
            processes: The processes that take part.
        """
        sums = (
            self._sum.expand(num_layers, num_layers),
            self._scale.expand(num_layers),
            torch.tensor([self._minibatches]),
        )
        numbers = processes.sum(torch.cat([each.flatten().double() for each in sums]))
        self._sum = numbers[: num_layers**2].reshape(num_layers, num_layers)
        self._scale = numbers[num_layers**2 : -1]
        self._minibatches = int(numbers[-1])

    def result(self) -> SimilarityMatrix:
        """``CKA_ij = mean_b HSIC1(K_i, K_j) / sqrt(mean_b HSIC1(K_i, K_i) mean_b HSIC1(K_j, K_j))``.

        Raises:
            UserError: A layer gives every token the same representation, so that its CKA is undefined.
        """
        assert self._minibatches, "no minibatch was added"
        mean = self._sum / self._minibatches
        self_similarity = mean.diagonal()
        for layer, defined in enumerate(self_similarity > _CANCELLED * self._scale / self._minibatches):
            if not defined:
                raise UserError(f"CKA is not defined: decoder layer {layer} gives all tokens the same representation")
        scale = self_similarity.sqrt()
        return SimilarityMatrix(mean / torch.outer(scale, scale), self.kernel)
