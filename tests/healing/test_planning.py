"""The batch when memory runs out after all."""

from __future__ import annotations

import pytest
import torch

from sglp_llm.errors import UserError
from sglp_llm.healing.planning import batch_that_runs


def attempts(fits: int, error: Exception) -> tuple[list[int], object]:
    tried: list[int] = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > fits:
            raise error

    return tried, attempt


@pytest.mark.parametrize(("fits", "expected"), [(12, 12), (7, 6), (5, 4), (1, 1)])
def test_it_is_the_largest_divisor_that_runs(fits: int, expected: int) -> None:
    tried, attempt = attempts(fits, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
    assert batch_that_runs(attempt, 12) == expected
    assert tried == [size for size in (12, 6, 4, 3, 2, 1) if size >= expected]


def test_one_sequence_is_too_much() -> None:
    with pytest.raises(UserError, match="out of memory with one sequence at a time: give --gradient-checkpointing"):
        batch_that_runs(attempts(0, torch.OutOfMemoryError("CUDA out of memory."))[1], 4)


def test_other_errors_are_not_about_memory() -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"):
        batch_that_runs(attempts(1, RuntimeError("shape mismatch"))[1], 4)
