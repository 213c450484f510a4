"""Conversations -> text, with the ranges that the assistant writes.

The text is rendered by the tokenizer's chat template, or in Alpaca's prompt if the tokenizer has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

from sglp_llm.calibration.corpora import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, Split, alpaca_rows
from sglp_llm.calibration.files import json_lines, text_field
from sglp_llm.calibration.packing import SEPARATOR, adds_bos
from sglp_llm.calibration.specs import Source
from sglp_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = "26 Jul 2024"
"""The date for templates that insert today's, so that the text does not change by the day; Llama 3.1's default."""

# Put before a template, this macro replaces transformers' function of the same name.
_SAME_DAY = f"{{% macro strftime_now(format) %}}{TODAY}{{% endmacro %}}"
_ALPACA_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: ``system``, ``user``, ``assistant``, or another role that the chat template accepts.
        content: The text.
        context: The field ``input`` of Alpaca's rows; mostly empty.
    """

    role: str
    content: str
    context: str = ""


@dataclass(frozen=True)
class Conversation:
    """One document of a chat source; ``len`` is its size in characters.

    Attributes:
        turns: The messages in order, at least one.
        where: Its file and line, for error messages.
    """

    turns: tuple[Turn, ...]
    where: str

    def __len__(self) -> int:
        return sum(len(turn.content) + len(turn.context) for turn in self.turns)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: The whole conversation; without a leading BOS token if the tokenizer adds one to every text.
        answers: Character ranges ``[start, stop)`` of the assistant's turns, their end markers included; ascending, disjoint.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


def holds_conversations(source: Source) -> bool:
    """Whether `conversations` can read the source."""
    return source.name in ("alpaca", "chat")


def conversations(source: Source, split: Split) -> Iterator[Conversation]:
    """The conversations of ``alpaca`` or ``chat:FILE`` in the source's order, read lazily.

    A line of a file is an object with ``messages``, a list of ``{"role": ..., "content": ...}``, or with Alpaca's fields
    ``instruction``, ``output`` and, where there is one, ``input``.

    Args:
        source: See `holds_conversations`.
        split: The split of Alpaca, unless the source names one.

    Raises:
        UserError: While iterating: the source cannot be read, or a line holds no conversation.
    """
    if source.path is None:
        for row in alpaca_rows(source.split or split):
            yield Conversation(_alpaca_turns(row["instruction"], row["input"], row["output"]), source.name)
        return
    empty = True
    for where, row in json_lines(source.path):
        empty = False
        yield Conversation(turns_of(row, where), where)
    if empty:
        raise UserError(f"{source.path}: the file is empty")


def render(tokenizer: PreTrainedTokenizerBase | None, conversation: Conversation) -> Rendered:
    """Renders a conversation as text and finds the assistant's turns in it.

    A turn of the assistant starts at the end of the rendered previous turns with a generation prompt, and stops at the end of
    the rendered turns up to it. A template may render an earlier turn differently from the last one (some drop reasoning). Such
    a turn is searched for by its content; if the content does not occur verbatim, the turn is not an answer.

    Args:
        tokenizer: Its chat template is used if it has one; ``None`` means Alpaca's prompt.
        conversation: The conversation.

    Raises:
        UserError: The template raises an error, or there is no template and Alpaca's prompt has no such role.
    """
    if tokenizer is None or tokenizer.chat_template is None:
        return _in_alpacas_prompt(conversation)
    return _Template(tokenizer, conversation).rendered()


def question(tokenizer: PreTrainedTokenizerBase | None, conversation: Conversation) -> str:
    """Renders turns to which the assistant is to answer, up to where its answer begins.

    Raises:
        UserError: See `render`.
    """
    if tokenizer is None or tokenizer.chat_template is None:
        return _in_alpacas_prompt(replace(conversation, turns=(*conversation.turns, Turn("assistant", "")))).text
    return _Template(tokenizer, conversation).question()


def tokenised(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """The token ids of a conversation, and which of them are answers.

    No special tokens are added to those of the template. A token belongs to an answer if its first character does.

    Raises:
        UserError: See `render`.
    """
    rendered = render(tokenizer, conversation)
    if not tokenizer.is_fast:
        return _in_pieces(tokenizer, rendered)
    found = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in found["offset_mapping"]]
    return found["input_ids"], [any(first <= start < last for first, last in rendered.answers) for start in starts]


def _in_pieces(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> tuple[list[int], list[bool]]:
    """For tokenizers without offsets: answers, and the text between them, are tokenised separately."""
    ids: list[int] = []
    answers: list[bool] = []
    borders = [0, *(place for answer in rendered.answers for place in answer), len(rendered.text)]
    for number, (start, stop) in enumerate(pairwise(borders)):
        piece = tokenizer(rendered.text[start:stop], add_special_tokens=False, verbose=False)["input_ids"]
        ids += piece
        answers += [number % 2 == 1] * len(piece)
    return ids, answers


def turns_of(row: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
    """The turns of one object of a file, see `conversations`.

    Raises:
        UserError: It holds no conversation.
    """
    if "messages" not in row:
        if not {"instruction", "output"} & row.keys():
            known = ", ".join(map(repr, row)) or "none"
            raise UserError(
                f"{where}: expected 'messages', or Alpaca's 'instruction' and 'output'; the fields are {known}"
            )
        context = text_field(row, "input", where) if row.get("input") is not None else ""
        return _alpaca_turns(text_field(row, "instruction", where), context, text_field(row, "output", where))
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' must be a list of objects with 'role' and 'content', and not empty")
    turns = []
    for number, message in enumerate(messages, start=1):
        here = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{here}: expected an object with 'role' and 'content', not {type(message).__name__}")
        turns.append(Turn(text_field(message, "role", here), text_field(message, "content", here)))
    return tuple(turns)


def _alpaca_turns(instruction: str, context: str, output: str) -> tuple[Turn, ...]:
    return Turn("user", instruction, context), Turn("assistant", output)


def _in_alpacas_prompt(conversation: Conversation) -> Rendered:
    """Alpaca's prompt for any number of turns; a leading system turn replaces its first sentences."""
    turns = conversation.turns
    has_context = any(turn.context for turn in turns)
    text = ""
    if turns[0].role != "system":
        text = (ALPACA_WITH_INPUT if has_context else ALPACA_WITHOUT_INPUT).partition(SEPARATOR)[0]
    answers = []
    for turn in turns:
        if turn.role not in _ALPACA_ROLES:
            raise UserError(
                f"{conversation.where}: the tokenizer has no chat template, and Alpaca's prompt has no role"
                f" {turn.role!r}, only {', '.join(_ALPACA_ROLES)}"
            )
        heading = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}[turn.role]
        text += (SEPARATOR if text else "") + heading
        start = len(text)
        text += turn.content
        if turn.role == "assistant":
            answers.append((start, len(text)))
        if turn.context:
            text += f"{SEPARATOR}### Input:\n{turn.context}"
    return Rendered(text, tuple(answers))


class _Template:
    """A tokenizer's chat template, applied to one conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> None:
        self._tokenizer, self._where = tokenizer, conversation.where
        self._adds_bos = adds_bos(tokenizer)
        self._messages = [
            {"role": turn.role, "content": SEPARATOR.join(part for part in (turn.content, turn.context) if part)}
            for turn in conversation.turns
        ]

    def rendered(self) -> Rendered:
        """See `render`."""
        text = self._text(self._messages)
        answers = []
        reached = 0  # end of the last turn that was found
        for number, message in enumerate(self._messages):
            if message["role"] == "assistant":
                answer = self._answer(number, text, reached)
                if answer is not None:
                    answers.append(answer)
                    reached = answer[1]
            elif (found := text.find(message["content"].strip(), reached)) >= 0:
                reached = found + len(message["content"].strip())
        return Rendered(text, tuple(answers))

    def question(self) -> str:
        """See `question`."""
        return self._text(self._messages, add_generation_prompt=True)

    def _answer(self, number: int, text: str, reached: int) -> tuple[int, int] | None:
        """The range of a turn of the assistant; ``None`` if it cannot be found."""
        content = self._messages[number]["content"].strip()
        before = self._text_or_none(self._messages[:number], add_generation_prompt=True)
        after = self._text_or_none(self._messages[: number + 1])
        asked = before is not None and text.startswith(before) and len(before) >= reached
        start = len(before or "") if asked else text.find(content, reached)
        if asked and after is not None and text.startswith(after) and len(after) > start:
            return start, len(after)
        found = text.find(content, max(start, 0))
        following = [message["content"].strip() for message in self._messages[number + 1 : number + 2]]
        limit = text.find(following[0], max(start, reached)) if any(following) else -1
        # A match inside the next turn is not the answer.
        if not content or found < 0 or 0 <= limit < found:
            return None
        stop = found + len(content)
        # The end marker: what follows the content if the turn is the last one, as far as it follows here too.
        ending = "" if after is None or content not in after else after[after.rindex(content) + len(content) :]
        same = takewhile(lambda pair: pair[0] == pair[1], zip(ending, text[stop:], strict=False))
        return start, stop + sum(1 for _ in same)

    def _text_or_none(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str | None:
        """``None`` if the template raises an error, as some do without a user turn."""
        try:
            return self._text(messages, add_generation_prompt)
        except UserError:
            return None

    def _text(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=_SAME_DAY + self._tokenizer.get_chat_template(),
            )
        except Exception as error:  # templates raise errors of their own
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self._where}: the tokenizer's chat template rejects the conversation ({reason})"
            ) from None
        assert isinstance(text, str)
        # Only if every window begins with a BOS token: SmolLM2's BOS token is the start marker of a turn.
        return text.removeprefix(self._tokenizer.bos_token) if self._adds_bos else text
