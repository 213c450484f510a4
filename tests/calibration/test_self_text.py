"""What a model writes itself: transformers' own sampling with the same seed, and nothing lost when it is interrupted."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_model
from helpers import tiny_tokenizer
from tiny_models import Tiny, every_tiny, random_model

from sglp_llm.calibration import calibration_set, load_documents
from sglp_llm.calibration.sampling import Sampler
from sglp_llm.calibration.self_text import self_text, tokens_to_write
from sglp_llm.errors import UserError
from sglp_llm.models.loading import DecoderModel, wrap_model
from sglp_llm.progress import Advance


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    return wrap_model(tiny_model(vocab_size=310))  # ten more than the tokenizer has


def documents(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def write(model: DecoderModel, folder: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {"tokens": 200, "seq_len": 24, "folder": folder, **changes}
    return self_text(model, arguments.pop("tokenizer", tiny_tokenizer(bos=True)), **arguments)


def seed_of(seed: int, batch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {batch}".encode()).digest()[:8], "big") >> 1


def sampled(model: DecoderModel, beginning: list[int], seed: int, batch: int, **settings: Any) -> list[str]:
    """Eight documents by a plain call of transformers; 1 is the tokenizer's EOS token, 2 the model's."""
    ids = torch.tensor([beginning] * 8)
    torch.manual_seed(seed_of(seed, batch))
    rows = model.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        max_length=24,
        eos_token_id=[1, 2],
        **settings,
    )
    return [
        tiny_tokenizer(bos=True).decode([id for id in row if id < 300], skip_special_tokens=True)
        for row in rows.tolist()
    ]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.4, "top_p": 0.7}])
def test_it_is_what_transformers_samples(model: DecoderModel, tmp_path: Path, settings: dict[str, float]) -> None:
    found = documents(write(model, tmp_path, seed=3, **settings))
    expected = [text for batch in range(len(found) // 8 + 1) for text in sampled(model, [0], 3, batch, **settings)]
    assert len(found) >= 8
    assert found == [text for text in expected if text.strip()][: len(found)]


def test_there_are_at_least_as_many_tokens_and_no_batch_too_many(model: DecoderModel, tmp_path: Path) -> None:
    texts = documents(write(model, tmp_path, tokens=500))
    counted = [len(tiny_tokenizer()(text)["input_ids"]) for text in texts]
    assert sum(counted) >= 500 > sum(counted[:-8])


def test_prompts_begin_the_documents_in_turn(model: DecoderModel, tmp_path: Path) -> None:
    prompts = ["The cat", "Once upon a time there was", "A"]
    texts = documents(write(model, tmp_path, prompts=prompts, tokens=300))
    assert [text.startswith(prompts[number % 3]) for number, text in enumerate(texts)] == [True] * len(texts)
    assert len(set(texts)) == len(texts)


def test_documents_of_different_prompts_are_not_disturbed_by_each_other(tmp_path: Path) -> None:
    # Where the next token is certain, padding must not show.
    certain = tiny_model()
    with torch.no_grad():
        certain.get_output_embeddings().weight.mul_(1e4)
    model = wrap_model(certain)
    together = documents(write(model, tmp_path, prompts=["the cat sat on", "a"], tokens=10, batch_size=2))
    alone = [
        documents(write(model, tmp_path, prompts=[each], tokens=5, batch_size=1))[0] for each in ("the cat sat on", "a")
    ]
    # The width of the batch limits both.
    assert all(own.startswith(text) and len(text) > 5 for text, own in zip(together, alone, strict=True))


@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
def test_every_family_writes(tiny: Tiny, tmp_path: Path) -> None:
    model = wrap_model(random_model(tiny.family, **tiny.settings))
    texts = documents(write(model, tmp_path, prompts=["the cat sat", "a"], tokens=20, seq_len=16, batch_size=2))
    assert [text[: len(start)] for text, start in zip(texts, ("the cat sat", "a"), strict=False)] == [
        "the cat sat",
        "a",
    ]


def test_the_models_own_generation_settings_do_not_count_but_for_its_end(model: DecoderModel, tmp_path: Path) -> None:
    plain = write(model, tmp_path / "a")
    changed = wrap_model(copy.deepcopy(model.model))
    settings = changed.model.generation_config
    settings.update(repetition_penalty=9.0, top_k=1, temperature=0.1, max_length=9, do_sample=True)
    assert documents(write(changed, tmp_path / "b")) == documents(plain)
    assert changed.model.generation_config is settings
    assert settings.top_k == 1
    settings.eos_token_id = [1, *range(3, 200)]  # most tokens end a document
    shorter = documents(write(changed, tmp_path / "c"))
    assert max(map(len, shorter)) < max(map(len, documents(plain)))


@pytest.mark.parametrize(
    ("bos", "eos", "expected"), [("<s>", "</s>", 0), (None, "</s>", 1), (None, None, 3), ("<11>", None, 3)]
)
def test_what_a_document_begins_with(model: DecoderModel, bos: str | None, eos: str | None, expected: int) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "</s>"]})
    tokenizer.add_tokens([f"<{number}>" for number in range(12)])  # the last ones are beyond the model's embeddings
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    assert Sampler(model, tokenizer, 8, 1, 1.0, 1.0).first_token() == expected


def test_nothing_outside_changes(model: DecoderModel, tmp_path: Path) -> None:
    training = copy.deepcopy(model.model).train()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    dropped = write(wrap_model(training), tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(each.training for each in training.modules())
    torch.manual_seed(12)
    assert documents(write(model, tmp_path / "b")) == documents(dropped)


def test_everything_that_counts_is_in_the_files_name(model: DecoderModel, tmp_path: Path) -> None:
    other = copy.deepcopy(model.model)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(0.01)  # the same shapes: fine-tuned
    smaller = wrap_model(tiny_model(vocab_size=311))
    files = [
        write(model, tmp_path),
        *(write(model, tmp_path, **change) for change in CHANGES),
        write(wrap_model(other), tmp_path),
        write(smaller, tmp_path),
        write(model, tmp_path, tokenizer=tiny_tokenizer(bos=False)),
    ]
    assert len(set(files)) == len(files)
    assert write(model, tmp_path) == files[0]
    assert sorted(tmp_path.iterdir()) == sorted(files)  # and no batch is left


CHANGES: list[dict[str, Any]] = [
    {"tokens": 201},
    {"seq_len": 23},
    {"seed": 1},
    {"prompts": ["a"]},
    {"batch_size": 7},
    {"temperature": 0.9},
    {"top_p": 0.9},
]


def test_a_file_that_is_complete_is_used(model: DecoderModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(model, tmp_path)
    monkeypatch.delattr(Sampler, "continued")
    assert write(model, tmp_path) == file


@pytest.mark.parametrize("damage", [None, '{"text": "cut sho'])
def test_an_interrupted_run_goes_on(
    model: DecoderModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str | None
) -> None:
    whole = write(model, tmp_path / "whole", tokens=2000).read_bytes()
    batch = Sampler.continued
    asked: list[int] = []

    def interrupted(self: Any, rows: Any, number: int, seed: int) -> list[list[int]]:
        asked.append(number)
        if number == 3 and len(asked) == 4:
            raise KeyboardInterrupt
        return batch(self, rows, number, seed)

    monkeypatch.setattr(Sampler, "continued", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(model, tmp_path / "cut", tokens=2000)
    parts = sorted((tmp_path / "cut").iterdir())
    assert len(parts) == 3
    if damage is not None:
        parts[1].write_text(damage)
    torch.manual_seed(7)
    file = write(model, tmp_path / "cut", tokens=2000)
    assert file.read_bytes() == whole
    assert asked[:4] == [0, 1, 2, 3]
    assert asked[4] == (3 if damage is None else 1)
    assert list((tmp_path / "cut").iterdir()) == [file]


def test_it_can_be_read_as_a_source(model: DecoderModel, tmp_path: Path) -> None:
    file = write(model, tmp_path, tokens=tokens_to_write("self", 8, 24))
    assert list(load_documents("self", "train", self_file=file)) == documents(file)
    tokenizer = tiny_tokenizer(bos=True)
    data = calibration_set(tokenizer, "self", samples=8, seq_len=24, self_file=file)
    assert data.source == "self"
    assert data.hash == calibration_set(tokenizer, f"jsonl:{file}:text", samples=8, seq_len=24).hash
    mixed = calibration_set(tokenizer, "pydoc self:3", samples=8, seq_len=24, self_file=file)
    assert mixed.source == "pydoc:train self:3"


def test_as_much_is_written_as_the_share_needs() -> None:
    assert tokens_to_write("wikitext2 c4", 32, 512) == 0
    assert tokens_to_write("self", 32, 512) == 33 * 512
    assert tokens_to_write("wikitext2 c4 self:2", 32, 512) == 17 * 512
    assert tokens_to_write("wikitext2:100 self", 4, 512) == 0


def test_progress_reaches_its_total(model: DecoderModel, tmp_path: Path) -> None:
    done: list[tuple[str, int, list[int]]] = []

    @contextmanager
    def progress(description: str, total: int) -> Iterator[Advance]:
        done.append((description, total, []))
        yield done[-1][2].append

    write(model, tmp_path, tokens=300, progress=progress)
    ((description, total, steps),) = done
    assert (description, total, sum(steps)) == ("Writing", 300, 300)
    assert len(steps) > 1


def test_a_model_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    silent = tiny_model()
    silent.generation_config.eos_token_id = list(range(silent.config.vocab_size))
    with pytest.raises(
        UserError, match=r"the model writes no text \(64 documents in a row are empty\); give it prompts"
    ):
        write(wrap_model(silent), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens is 0; at least 1"),
        ({"batch_size": 0}, "batch_size is 0; at least 1"),
        ({"seq_len": 1}, "seq_len is 1; at least 2"),
        ({"seq_len": 129}, "seq_len 129 is longer than the 128 positions"),
        ({"temperature": 0.0}, "temperature must be positive, not 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"top_p": 0.0}, "top_p must lie above 0 and be at most 1"),
        ({"top_p": 1.1}, "top_p must lie above 0 and be at most 1"),
        ({"prompts": ["a", ""]}, "prompts: one is empty"),
        ({"prompts": ["q" * 30]}, "has 31 tokens; it must leave room in documents of 24"),
    ],
)
def test_settings_that_make_no_sense(model: DecoderModel, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(model, tmp_path, **change)
    assert not list(tmp_path.iterdir())
