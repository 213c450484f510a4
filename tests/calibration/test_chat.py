"""Conversations as text, with and without a chat template, and which tokens are the assistant's."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sglp_llm.calibration import calibration_set, check_spec, evaluation_windows, load_documents
from sglp_llm.calibration.chat import Conversation, Turn, conversations, render, tokenised
from sglp_llm.calibration.corpora import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT
from sglp_llm.calibration.specs import parse_source
from sglp_llm.errors import UserError

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Every turn alike, ended by the EOS token."""

WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[ASK] {{ m.content | trim }} [/ASK]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}</s>"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
"""No generation prompt beyond what ends the user's turn, trimmed contents, few roles."""

REASONING = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""The last answer is shown otherwise than those before it."""

THINK_FIRST = CHATML.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>\n{% endif %}")
"""The generation prompt begins what conversations do not hold."""

MESSAGES = [
    ("system", "Be brief."),
    ("user", "yes or no?"),
    ("assistant", "yes"),
    ("user", "Why yes?"),
    ("assistant", " Because of\n\nthe Zürich naïveté."),
]


def chat(*messages: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Turn(role, content) for role, content in messages), "here")


def tokenizer_with(template: str, bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(bos)
    tokenizer.chat_template = template
    return tokenizer


def answers(tokenizer: Any, conversation: Conversation) -> list[str]:
    found = render(tokenizer, conversation)
    return [found.text[start:stop] for start, stop in found.answers]


def write(file: Path, *rows: Any) -> str:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return f"chat:{file}"


def turns_of(*messages: tuple[str, str]) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


# Reading


@pytest.mark.parametrize("name", ["a.jsonl", "a b.jsonl.gz"])
def test_a_line_holds_messages_or_alpacas_fields(tmp_path: Path, name: str) -> None:
    spec = write(
        tmp_path / name,
        turns_of(*MESSAGES),
        {"instruction": "Add.", "input": "1 2", "output": "3", "id": 7},
        {"instruction": "Hi.", "output": "Ho.", "input": None},
    )
    check_spec(spec)
    found = list(conversations(parse_source(spec), "train"))
    assert [[(turn.role, turn.content, turn.context) for turn in each.turns] for each in found] == [
        [(role, content, "") for role, content in MESSAGES],
        [("user", "Add.", "1 2"), ("assistant", "3", "")],
        [("user", "Hi.", ""), ("assistant", "Ho.", "")],
    ]
    assert found[2].where == f"{tmp_path / name}, line 3"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "a"}, "expected 'messages', or Alpaca's 'instruction' and 'output'; the fields are 'text'"),
        ({}, "the fields are none"),
        ({"instruction": "a"}, "there is no field 'output'"),
        ({"output": "a"}, "there is no field 'instruction'"),
        ({"instruction": "a", "input": 1, "output": "b"}, "field 'input' must be text, not int"),
        ({"messages": []}, "'messages' must be a list of objects with 'role' and 'content', and not empty"),
        ({"messages": "a"}, "'messages' must be a list"),
        ({"messages": ["a"]}, "message 1: expected an object with 'role' and 'content', not str"),
        (turns_of(("user", "a")) | {"messages": [{"role": "user"}]}, "message 1: there is no field 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "field 'content' must be text, not list"),
        ([1], "expected a JSON object, not list"),
    ],
)
def test_a_line_that_holds_no_conversation(tmp_path: Path, line: Any, message: str) -> None:
    file = tmp_path / "a.jsonl"
    for before in ([], [turns_of(*MESSAGES)]):
        spec = write(file, *before, line)
        with pytest.raises(UserError) as caught:
            list(load_documents(spec, "train"))
        assert str(caught.value).startswith(f"{file}, line {len(before) + 1}")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="line 1"):
        check_spec(write(file, line))


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    for spec, message in (
        ("chat:", "'chat:' names no file; write chat:FILE"),
        (f"chat:{tmp_path}/no", "there is no such file"),
        (write(tmp_path / "empty"), "the file is empty"),
    ):
        with pytest.raises(UserError, match=message):
            check_spec(spec)


def test_a_role_that_only_a_template_knows_is_left_to_the_template(tmp_path: Path) -> None:
    spec = write(tmp_path / "a", turns_of(("tool", "x"), ("assistant", "y")))
    check_spec(spec)
    assert list(load_documents(spec, "train", tokenizer_with(CHATML))) == ["<|tool|>\nx</s>\n<|assistant|>\ny</s>\n"]
    with pytest.raises(
        UserError,
        match="line 1: the tokenizer has no chat template, and Alpaca's prompt has no role 'tool', only system",
    ):
        list(load_documents(spec, "train", tiny_tokenizer()))


# Alpaca's prompt


@given(*[st.text(max_size=20)] * 3)
@settings(deadline=None)
def test_without_a_template_alpacas_rows_are_in_its_prompt(instruction: str, context: str, output: str) -> None:
    form = ALPACA_WITH_INPUT if context else ALPACA_WITHOUT_INPUT
    expected = form.format(instruction=instruction, input=context, output=output)
    rows = Conversation((Turn("user", instruction, context), Turn("assistant", output)), "")
    found = render(None, rows)
    assert found.text == expected
    assert found.answers == ((len(expected) - len(output), len(expected)),)


def test_further_turns_follow_alike_and_a_system_turn_replaces_the_first_sentences() -> None:
    found = render(tiny_tokenizer(), chat(*MESSAGES))
    assert found.text == (
        "Be brief.\n\n### Instruction:\nyes or no?\n\n### Response:\nyes\n\n### Instruction:\nWhy yes?\n\n"
        "### Response:\n Because of\n\nthe Zürich naïveté."
    )
    assert answers(None, chat(*MESSAGES)) == ["yes", " Because of\n\nthe Zürich naïveté."]


def test_alpaca_as_calibration_text_stays_in_its_prompt_whatever_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": f"do {n}", "input": "", "output": f"did {n}"} for n in range(40)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    plain, chatty = (
        calibration_set(each, "alpaca", samples=4, seq_len=32) for each in (tiny_tokenizer(), tokenizer_with(CHATML))
    )
    assert plain.hash == chatty.hash
    assert len(list(conversations(parse_source("alpaca"), "train"))) == 36
    assert [each.turns[1].content for each in conversations(parse_source("alpaca:test"), "train")] == [
        "did 9",
        "did 19",
        "did 29",
        "did 39",
    ]


# Templates


def test_answers_are_the_assistants_turns_to_their_end() -> None:
    assert answers(tokenizer_with(CHATML), chat(*MESSAGES)) == [
        "yes</s>\n",
        " Because of\n\nthe Zürich naïveté.</s>\n",
    ]


def test_a_template_that_trims_and_has_a_bos_token_of_its_own() -> None:
    tokenizer = tokenizer_with(WITH_BOS, bos=True)
    found = render(tokenizer, chat(*MESSAGES[1:]))
    assert found.text == "[ASK] yes or no? [/ASK] yes</s>[ASK] Why yes? [/ASK] Because of\n\nthe Zürich naïveté.</s>"
    assert answers(tokenizer, chat(*MESSAGES[1:])) == [" yes</s>", " Because of\n\nthe Zürich naïveté.</s>"]
    with pytest.raises(
        UserError, match=r"^here: the tokenizer's chat template rejects the conversation \(only user and"
    ):
        render(tokenizer, chat(*MESSAGES))


def test_a_bos_token_that_begins_every_turn_stays() -> None:
    tokenizer = tokenizer_with("{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}")
    tokenizer.bos_token = "<s>"  # as SmolLM2 has it: known, and not put in front of texts
    assert render(tokenizer, chat(("user", "a"), ("assistant", "b"))).text == "<s>user\na</s>\n<s>assistant\nb</s>\n"


def test_a_template_that_shows_the_last_turn_otherwise() -> None:
    assert answers(tokenizer_with(REASONING), chat(*MESSAGES)) == [
        "yes</s>\n",
        "<think>\n\n</think>\n\n Because of\n\nthe Zürich naïveté.</s>\n",
    ]


def test_a_generation_prompt_that_conversations_do_not_hold() -> None:
    # Looked for by content: behind the question, which holds the same word.
    assert answers(tokenizer_with(THINK_FIRST), chat(*MESSAGES)) == [
        "yes</s>\n",
        "Because of\n\nthe Zürich naïveté.</s>\n",
    ]


def test_a_turn_that_the_template_rewrites_is_no_answer() -> None:
    loud = CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' or loop.last else m.content | upper }}")
    assert answers(tokenizer_with(loud), chat(*MESSAGES)) == [" Because of\n\nthe Zürich naïveté.</s>\n"]


def test_an_answer_without_words_is_its_end_alone() -> None:
    assert answers(tokenizer_with(CHATML), chat(("user", "a"), ("assistant", ""), ("user", "b"))) == ["</s>\n"]


def test_a_conversation_that_the_assistant_begins() -> None:
    refusing = "{% if not messages %}{{ raise_exception('nothing') }}{% endif %}" + CHATML
    for template in (CHATML, refusing):
        assert answers(tokenizer_with(template), chat(("assistant", "Hello"), ("user", "a")))[0].endswith("Hello</s>\n")


def test_the_day_in_a_template_is_always_the_same() -> None:
    dated = "{{ strftime_now('%d %B %Y') }}" + CHATML
    assert render(tokenizer_with(dated), chat(("user", "a"))).text.startswith("26 Jul 2024<|user|>")


# Tokens


@pytest.mark.parametrize("template", [None, CHATML, WITH_BOS, REASONING, THINK_FIRST])
def test_the_tokens_that_are_answers_are_the_answers(template: str | None) -> None:
    tokenizer = tiny_tokenizer(bos=True) if template is None else tokenizer_with(template, bos=True)
    conversation = chat(*MESSAGES[1:])
    ids, mine = tokenised(tokenizer, conversation)
    assert ids == tokenizer(render(tokenizer, conversation).text, add_special_tokens=False)["input_ids"]
    runs, before = [], False
    for token, answer in zip(ids, mine, strict=True):
        if answer and not before:
            runs.append([])
        if answer:
            runs[-1].append(token)
        before = answer
    assert [tokenizer.decode(run) for run in runs] == answers(tokenizer, conversation)


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, conversation = tokenizer_with(CHATML), chat(*MESSAGES)
    fast = tokenised(tokenizer, conversation)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert tokenised(tokenizer, conversation) == fast  # no token of this tokenizer crosses these borders


TURNS = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=12)), min_size=1, max_size=6)


@given(TURNS)
@settings(deadline=None)
def test_answers_are_exactly_what_the_assistant_said(turns: list[tuple[str, str]]) -> None:
    turns = [("user", "Begin."), *turns]
    said = [f"{content}</s>\n" for role, content in turns if role == "assistant"]
    assert answers(tokenizer_with(CHATML), chat(*turns)) == said
    assert answers(None, chat(*turns)) == [content for role, content in turns if role == "assistant"]


# As calibration text


def test_as_calibration_text_a_chat_is_its_template(tmp_path: Path) -> None:
    rows = [turns_of(("user", f"question {n}"), ("assistant", f"answer {n} and more of it")) for n in range(30)]
    spec, tokenizer = write(tmp_path / "a.jsonl", *rows), tokenizer_with(CHATML)
    text = "\n\n".join(f"<|user|>\nquestion {n}</s>\n<|assistant|>\nanswer {n} and more of it</s>\n" for n in range(30))
    windows = evaluation_windows(tokenizer, spec, window=16).input_ids
    assert windows.flatten().tolist() == tokenizer(text)["input_ids"][: windows.numel()]
    data = calibration_set(tokenizer, spec, samples=4, seq_len=16)
    assert data.source == spec
    assert 1 in data.input_ids  # the template's EOS token, not its letters
