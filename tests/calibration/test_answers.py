"""Questions that a model answers: transformers' own sampling with the same seed, and nothing lost when it is interrupted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_model
from helpers import tiny_tokenizer

from sglp_llm.calibration import training_sequences
from sglp_llm.calibration.answers import answered
from sglp_llm.calibration.sampling import Sampler
from sglp_llm.errors import UserError
from sglp_llm.models.loading import DecoderModel, wrap_model

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
QUESTIONS = [f"word{number} the of and" for number in range(5)]
ROWS: list[dict[str, Any]] = [
    *({"instruction": each, "input": "", "output": "never used"} for each in QUESTIONS[:4]),
    {
        "messages": [
            {"role": "system", "content": "to"},
            {"role": "user", "content": QUESTIONS[4]},
            {"role": "assistant", "content": "never used"},
            {"role": "user", "content": "never asked"},
        ]
    },
]
LONG = {"instruction": "the of and to " * 40, "output": "never used"}
UNASKED = {"messages": [{"role": "assistant", "content": "never used"}]}


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    return wrap_model(tiny_model(vocab_size=300, max_position_embeddings=512))


def chatting(bos: bool = False) -> Any:
    tokenizer = tiny_tokenizer(bos=bos)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def answers(model: DecoderModel, folder: Path, tokenizer: Any = None, rows: list[Any] = ROWS, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments: dict[str, Any] = {"tokens": None, "seq_len": 96, "batch_size": 2, "folder": folder / "cache", **changes}
    return answered(model, chatting() if tokenizer is None else tokenizer, f"chat:{file}", **arguments)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def question_of(row: dict[str, Any]) -> str:
    return str(row.get("instruction") or row["messages"][-2]["content"])


@pytest.mark.parametrize("bos", [False, True])
def test_it_is_transformers_sampling(bos: bool, model: DecoderModel, tmp_path: Path) -> None:
    tokenizer = chatting(bos)
    rows = read(answers(model, tmp_path, tokenizer, batch_size=1))
    assert sorted(map(question_of, rows)) == QUESTIONS
    for number, row in enumerate(rows):
        text = f"<user>{question_of(row)}\n<assistant>"
        text = text if "instruction" in row else f"<system>to\n{text}"
        ids = [*([tokenizer.bos_token_id] if bos else []), *tokenizer(text, add_special_tokens=False)["input_ids"]]
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"0 {number}".encode()).digest()[:8], "big") >> 1)
        prompt = torch.tensor([ids])
        found = model.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            top_k=0,
            max_length=96,
            eos_token_id=[1, 2],
            pad_token_id=0,
        )
        expected = tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        given = row["output"] if "instruction" in row else row["messages"][-1]["content"]
        assert given == expected


def test_only_answers_are_predicted(model: DecoderModel, tmp_path: Path) -> None:
    file = answers(model, tmp_path)
    text = file.read_text()
    assert "never" not in text
    data = training_sequences(chatting(), f"chat:{file}", tokens=None, seq_len=32)
    predicted = chatting().decode(data.input_ids[data.labels != -100])
    assert "user" not in predicted


def test_without_a_template_it_is_alpacas_prompt(model: DecoderModel, tmp_path: Path) -> None:
    rows = [{"instruction": "word1", "input": "word2", "output": "never used"}]
    found = read(answers(model, tmp_path, tiny_tokenizer(), rows, seq_len=500))
    assert len(found) == 1
    assert (found[0]["instruction"], found[0]["input"]) == ("word1", "word2")


def test_questions_that_leave_no_room_and_answers_without_a_question_are_left_out(
    model: DecoderModel, tmp_path: Path
) -> None:
    found = read(answers(model, tmp_path, rows=[LONG, UNASKED, *ROWS]))
    assert sorted(map(question_of, found)) == QUESTIONS


def test_it_ends_with_enough_tokens(model: DecoderModel, tmp_path: Path) -> None:
    few, all_of_them = answers(model, tmp_path, tokens=1), answers(model, tmp_path)
    assert few != all_of_them
    assert len(read(few)) == 2
    assert read(all_of_them)[:2] == read(few)


def test_an_interrupted_run_goes_on(model: DecoderModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answers(model, tmp_path / "whole").read_bytes()
    sample, asked = Sampler.continued, list[int]()

    def interrupted(self: Any, rows: Any, number: int, seed: int) -> list[list[int]]:
        asked.append(number)
        if asked == [0, 1]:
            raise KeyboardInterrupt
        return sample(self, rows, number, seed)

    monkeypatch.setattr(Sampler, "continued", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answers(model, tmp_path / "cut")
    assert answers(model, tmp_path / "cut").read_bytes() == whole
    assert asked == [0, 1, 1, 2]


def test_what_has_no_questions(model: DecoderModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"questions\.jsonl has no question that fits into half of 96 tokens"):
        answers(model, tmp_path, rows=[LONG])
    with pytest.raises(UserError, match=r"answers: 'pydoc' holds no conversations: name alpaca or chat:FILE"):
        answered(model, chatting(), "pydoc", tokens=None, seq_len=64, folder=tmp_path)
