"""The losses of distillation against torch's own functions, written out sequence by sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Tiny, logits_of, tiny_model, token_ids
from torch import nn

from sglp_llm.healing.loss import IGNORED, TopK, divergence, hidden_state_loss, next_token_loss, top_k_of


def drawn(seed: int, batch: int, tokens: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a student and a teacher, and labels of which about a third are not counted."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(batch, tokens, vocabulary, generator=generator) for _ in range(2))
    labels = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
    return student, teacher, labels.masked_fill(torch.rand(batch, tokens, generator=generator) < 0.3, IGNORED)


def by_hand(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """``T^2 KL`` by ``torch.nn.functional.kl_div``, the mean of each sequence, then over sequences."""
    means = []
    for own, other, label in zip(student, teacher, labels, strict=True):
        counted = (label[1:] != IGNORED).nonzero().flatten()
        if len(counted) == 0:
            means.append(own.sum() * 0)
            continue
        own, other = ((each[counted] / temperature).log_softmax(-1) for each in (own, other))
        means.append(nn.functional.kl_div(own, other, log_target=True, reduction="batchmean"))
    return temperature**2 * sum(means) / len(means)


SHAPES = {"seed": st.integers(0, 99), "batch": st.integers(1, 4), "tokens": st.integers(2, 9)}


@settings(deadline=None, max_examples=40)
@given(**SHAPES, vocabulary=st.integers(2, 30), temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_divergence_and_its_gradient(seed: int, batch: int, tokens: int, vocabulary: int, temperature: float) -> None:
    student, teacher, labels = drawn(seed, batch, tokens, vocabulary)
    ours, theirs = (student.clone().requires_grad_(True) for _ in range(2))
    found, expected = divergence(ours, teacher, labels, temperature), by_hand(theirs, teacher, labels, temperature)
    torch.testing.assert_close(found, expected)
    if (labels[:, 1:] != IGNORED).any():
        (3 * found).backward()
        (3 * expected).backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def distributions(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The student's and the teacher's probabilities at every counted position, sequence by sequence."""
    pairs = zip(student.softmax(-1), teacher.softmax(-1), labels, strict=True)
    return [
        [(own[at], other[at]) for at in (label[1:] != IGNORED).nonzero().flatten().tolist()]
        for own, other, label in pairs
    ]


def generalised(own: torch.Tensor, other: torch.Tensor, beta: float) -> torch.Tensor:
    """``beta KL(teacher || M) + (1 - beta) KL(student || M)`` of two vectors of probabilities."""
    if beta == 1:
        return (own * (own / other).log()).sum()
    mixed = beta * other + (1 - beta) * own
    return beta * (other * (other / mixed).log()).sum() + (1 - beta) * (own * (own / mixed).log()).sum()


@settings(deadline=None, max_examples=40)
@given(**SHAPES, beta=st.sampled_from([0.1, 0.5, 0.9, 1.0]), k=st.sampled_from([None, 3, 8]))
def test_other_divergences_and_their_gradients(seed: int, batch: int, tokens: int, beta: float, k: int | None) -> None:
    student, teacher, labels = drawn(seed, batch, tokens, 8)
    ours, theirs = student.clone().requires_grad_(True), student.double().requires_grad_(True)
    found = divergence(ours, teacher if k is None else top_k_of(teacher, k, 1.0), labels, beta=beta)
    total = theirs.sum() * 0
    for positions in distributions(theirs, teacher.double(), labels):
        for own, other in positions:
            if k == 3:
                top = other.argsort(descending=True)[:3]
                own, other = (torch.cat([each[top], 1 - each[top].sum()[None]]) for each in (own, other))
            total = total + generalised(own, other, beta) / len(positions) / batch
    torch.testing.assert_close(found.double(), total, rtol=1e-3, atol=1e-4)
    if (labels[:, 1:] != IGNORED).any():
        found.backward()
        total.backward()
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-2, atol=1e-4)


def test_hidden_states_differ_relative_to_the_teachers() -> None:
    generator = torch.Generator().manual_seed(1)
    own, other = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    labels = torch.ones(2, 5, dtype=torch.int64)
    labels[0, 2] = labels[1, 1:4] = IGNORED
    counted = [[0, 2, 3], [3]]
    means = []
    for row, positions in enumerate(counted):
        ratios = [float((own[row, at] - other[row, at]).norm() / other[row, at].norm()) ** 2 for at in positions]
        means.append(sum(ratios) / len(ratios))
    assert float(hidden_state_loss(own, other, labels)) == pytest.approx(sum(means) / 2, rel=1e-5)
    assert float(hidden_state_loss(other, other, labels)) == 0
    torch.testing.assert_close(hidden_state_loss(10 * own, 10 * other, labels), hidden_state_loss(own, other, labels))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = drawn(1, 2, 9, 20)
    results = []
    for limit in (2**20, 4 * 2 * 20 * 3, 1):
        monkeypatch.setattr("sglp_llm.healing.loss._CPU_CHUNK_BYTES", limit)
        own = student.clone().requires_grad_(True)
        loss = divergence(own, teacher, labels)
        loss.backward()
        results.append((loss.detach(), own.grad))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


@settings(deadline=None, max_examples=40)
@given(**SHAPES, k=st.integers(1, 6), temperature=st.sampled_from([1.0, 2.0]))
def test_what_is_not_among_the_most_likely_tokens_is_one_bucket(
    seed: int, batch: int, tokens: int, k: int, temperature: float
) -> None:
    student, teacher, labels = drawn(seed, batch, tokens, 8)
    found = divergence(student, top_k_of(teacher, k, temperature), labels, temperature)
    total = 0.0
    for own, other, label in zip(student.double(), teacher.double(), labels, strict=True):
        own, other, values = (own / temperature).softmax(-1), (other / temperature).softmax(-1), []
        for position in range(tokens - 1):
            if label[position + 1] == IGNORED:
                continue
            top = other[position].argsort(descending=True)[:k]
            p, q = (torch.cat([each[position, top], 1 - each[position, top].sum()[None]]) for each in (other, own))
            values.append(float((p * (p / q).log()).sum()))
        total += sum(values) / max(1, len(values))
    assert float(found) == pytest.approx(temperature**2 * total / batch, rel=1e-3, abs=1e-4)


@given(**SHAPES)
@settings(deadline=None, max_examples=20)
def test_all_tokens_are_no_bucket(seed: int, batch: int, tokens: int) -> None:
    student, teacher, labels = drawn(seed, batch, tokens, 8)
    everything = top_k_of(teacher, 20, 1.5)
    assert everything.ids.shape[-1] == 8
    torch.testing.assert_close(divergence(student, everything, labels, 1.5), divergence(student, teacher, labels, 1.5))


def test_a_teacher_is_no_distance_from_itself() -> None:
    student, _, labels = drawn(2, 3, 6, 11)
    assert float(divergence(student, student, labels)) == pytest.approx(0, abs=1e-6)
    assert float(divergence(student, top_k_of(student, 3, 1.0), labels)) == pytest.approx(0, abs=1e-5)


def test_the_next_token_loss_is_transformers_own() -> None:
    model, ids = tiny_model(Tiny("llama", 0)), token_ids(3)
    labels = ids.clone()
    labels[0, :7] = labels[2, 11] = IGNORED
    with torch.no_grad():
        alone = [
            float(model(input_ids=row[None], labels=label[None]).loss) for row, label in zip(ids, labels, strict=True)
        ]
    assert float(next_token_loss(logits_of(model, ids), labels)) == pytest.approx(sum(alone) / 3, rel=1e-5)


def test_a_sequence_without_labels_counts_nothing() -> None:
    student, teacher, labels = drawn(3, 2, 5, 7)
    labels[1] = IGNORED
    half = divergence(student[:1], teacher[:1], labels[:1])
    torch.testing.assert_close(divergence(student, teacher, labels), half / 2)
    assert torch.isfinite(next_token_loss(student, labels))
    assert isinstance(top_k_of(teacher, 2, 1.0), TopK)
