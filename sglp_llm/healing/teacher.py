"""The teacher: the model whose next-token distributions the student learns, in memory or from disk."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sglp_llm.engine.final import final_states
from sglp_llm.engine.replay import Replay
from sglp_llm.healing.loss import TopK, top_k_of
from sglp_llm.healing.remembered import Remembered
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.modes import evaluating
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent
from sglp_llm.tensor_files.tensors import read_tensors, write_tensors
from sglp_llm.trials import Journal

SHARD_SEQUENCES = 16
"""Sequences of one file of stored log-probabilities."""

_OPEN_SHARDS = 8
_CHUNK_BYTES = 64 * 2**20  # of float32 logits at a time


def logits_at(model: nn.Module, input_ids: Tensor, positions: Tensor | None) -> Tensor:
    """A language model's logits ``[batch, tokens, vocabulary]``, or ``[batch, chosen, vocabulary]`` at some positions.

    The head computes no others in a model that takes transformers' ``logits_to_keep``.

    Args:
        model: A plain model, or a wrapper around one that passes arguments on.
        input_ids: ``[batch, tokens]``.
        positions: ``[chosen]``; ``None`` = all.
    """
    if positions is None:
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
        return logits
    if _takes_positions(model):
        chosen: Tensor = model(input_ids=input_ids, use_cache=False, logits_to_keep=positions).logits
        return chosen
    return logits_at(model, input_ids, None)[:, positions]


def _takes_positions(model: nn.Module) -> bool:
    """Whether the innermost module with a head has the argument; wrappers pass on what they do not know."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return "logits_to_keep" in inspect.signature(module.forward).parameters
    return False


class Teacher(ABC):
    """What the loss is compared with."""

    @abstractmethod
    def targets(self, sequences: Tensor, input_ids: Tensor, positions: Tensor | None = None) -> Tensor | TopK:
        """The teacher's predictions for some training sequences.

        Args:
            sequences: ``[batch]`` int64: their numbers.
            input_ids: ``[batch, tokens]``.
            positions: ``[chosen]`` int64: only at these.

        Returns:
            Logits ``[batch, tokens or chosen, vocabulary]``, or the most likely tokens.
        """

    def remember(self, sequences: Iterable[int]) -> None:
        """Says that these sequences will be asked for again and again, with the same tokens; what is on disk needs no memory."""
        del sequences


class OnlineTeacher(Teacher):
    """A teacher in memory, which runs beside the student.

    Args:
        model: The teacher, whole in memory.
        top_k: Give the most likely tokens instead of all logits.
        temperature: Of the distribution that these are taken from.
        bfloat16: Multiply matrices in bfloat16, as the student does.

    Attributes:
        model: The teacher.
    """

    def __init__(
        self, model: DecoderModel, top_k: int | None = None, temperature: float = 1.0, bfloat16: bool = False
    ) -> None:
        self.model, self._top_k, self._temperature = model, top_k, temperature
        self._bfloat16 = bfloat16
        self._states = Remembered()  # that leave the last decoder layer

    def remember(self, sequences: Iterable[int]) -> None:
        self._states = Remembered(sequences)

    def targets(self, sequences: Tensor, input_ids: Tensor, positions: Tensor | None = None) -> Tensor | TopK:
        device, numbers = self.model.input_device, sequences.tolist()
        rounded = torch.autocast(device.type, torch.bfloat16, enabled=self._bfloat16)
        with torch.no_grad(), evaluating(self.model.model), rounded:
            if self._states.wants(numbers):
                logits = self._remembered(numbers, input_ids.to(device), positions)
            else:
                logits = logits_at(self.model.model, input_ids.to(device), positions)
        return logits if self._top_k is None else top_k_of(logits, self._top_k, self._temperature)

    def _remembered(self, numbers: Sequence[int], input_ids: Tensor, positions: Tensor | None) -> Tensor:
        """The logits, from what left the last decoder layer when the sequences were first seen."""
        replay = Replay(self.model, input_ids, None)
        if (states := self._states.get(numbers, input_ids.device)) is None:
            states = replay.layers(0, frozenset(), replay.first_states)
            self._states.put(numbers, states)
        chosen = slice(None) if positions is None else positions
        return replay.logits(states[:, chosen], chosen)


class StoredTeacher(Teacher):
    """A teacher whose most likely tokens were computed before, see `store_teacher`.

    Args:
        folder: With the shards of all sequences.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def targets(self, sequences: Tensor, input_ids: Tensor, positions: Tensor | None = None) -> TopK:
        rows = [self._row(int(number)) for number in sequences]
        ids, log_probs = (torch.stack(each) for each in zip(*rows, strict=True))
        stored = TopK(ids.long(), log_probs)
        return stored if positions is None else stored.at(positions.cpu())

    def _row(self, number: int) -> tuple[Tensor, Tensor]:
        shard, row = divmod(number, SHARD_SEQUENCES)
        if shard not in self._open:
            self._open[shard] = read_tensors(shard_file(self._folder, shard))
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]["ids"][row], self._open[shard]["log_probs"][row]


def shard_file(folder: Path, shard: int) -> Path:
    """The file of the sequences ``[shard * SHARD_SEQUENCES, (shard + 1) * SHARD_SEQUENCES)``."""
    return folder / f"top-k-{shard:05}.safetensors"


def store_teacher(
    model: DecoderModel,
    input_ids: Tensor,
    folder: Path,
    *,
    top_k: int,
    temperature: float,
    identity: dict[str, str | None],
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> StoredTeacher:
    """Computes the teacher's most likely tokens at every position and stores them, shard by shard.

    Shards that an interrupted run has finished are kept. A streamed teacher is read once for all shards that are missing.

    Args:
        model: The teacher, resident or streamed.
        input_ids: ``[sequences, tokens]``: all training and held-out sequences.
        folder: Where the shards are written; made where it is missing.
        top_k: How many tokens at each position.
        temperature: Of the distribution that they are taken from.
        identity: What tells the teacher from others, as in `OpenedModel.setting`.
        progress: Called with the layers times batches that are done.
        processes: Each computes its share of the shards.

    Raises:
        UserError: The folder holds the shards of another teacher, other sequences or other settings.
    """
    text = hashlib.sha256(input_ids.numpy().astype("<i8").tobytes()).hexdigest()
    setting = {**identity, "sequences": text, "top_k": top_k, "temperature": temperature}
    Journal(folder / "setting", setting)
    count = -(-len(input_ids) // SHARD_SEQUENCES)
    mine = processes.share(count)
    missing = [shard for shard in range(mine.start, mine.stop) if not shard_file(folder, shard).exists()]
    groups = [missing] if model.weights is not None else [[shard] for shard in missing]
    for group in groups if missing else []:
        rows = [torch.arange(len(input_ids))[shard * SHARD_SEQUENCES :][:SHARD_SEQUENCES] for shard in group]
        _store(model, input_ids, rows, group, folder, top_k, temperature, progress)
    processes.wait()  # nobody reads a shard that another process has not written yet
    return StoredTeacher(folder)


def _store(
    model: DecoderModel,
    input_ids: Tensor,
    rows: Sequence[Tensor],
    shards: Sequence[int],
    folder: Path,
    top_k: int,
    temperature: float,
    progress: Progress,
) -> None:
    found: list[TopK] = []
    lengths = [len(each) for each in rows]
    for _, replay, states in final_states(model, input_ids[torch.cat(list(rows))], 1, progress, "Teacher"):
        length = max(1, _CHUNK_BYTES // (4 * replay.vocabulary))
        parts = [
            top_k_of(replay.logits(states[:, first : first + length], slice(first, first + length)), top_k, temperature)
            for first in range(0, states.shape[1], length)
        ]
        ids = torch.cat([part.ids for part in parts], dim=1).to(torch.int32).cpu()
        found.append(TopK(ids, torch.cat([part.log_probs for part in parts], dim=1).cpu()))
        if len(found) == lengths[0]:
            shard = shards[len(shards) - len(lengths)]
            _write_shard(shard_file(folder, shard), found)
            found.clear()
            del lengths[0]


def _write_shard(file: Path, found: Sequence[TopK]) -> None:
    partial = file.with_suffix(".partial")
    ids, log_probs = (torch.cat([getattr(each, name) for each in found]) for name in ("ids", "log_probs"))
    write_tensors(partial, {"ids": ids, "log_probs": log_probs})
    partial.replace(file)
