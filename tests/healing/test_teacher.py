"""A teacher from disk against the same teacher in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import Tiny, every_tiny, random_model, save_tiny, tiny_model

from sglp_llm.errors import UserError
from sglp_llm.healing import teacher as module
from sglp_llm.healing.teacher import OnlineTeacher, StoredTeacher, shard_file, store_teacher
from sglp_llm.models import find_source
from sglp_llm.models.loading import DecoderModel, load_streamed, wrap_model

IDS = torch.randint(3, 300, (7, 24), generator=torch.Generator().manual_seed(4))
WHO: dict[str, str | None] = {"model": "teacher"}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_SEQUENCES", 3)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 320 * 5)


def stored(model: DecoderModel, folder: Path, ids: torch.Tensor = IDS, top_k: int = 5) -> StoredTeacher:
    return store_teacher(model, ids, folder, top_k=top_k, temperature=2.0, identity=WHO)


def check(teacher: StoredTeacher, model: DecoderModel) -> None:
    online = OnlineTeacher(model, 5, 2.0)
    for numbers in ([0, 1], [6], [4, 2, 5]):
        chosen = torch.tensor(numbers)
        found, expected = teacher.targets(chosen, IDS[chosen]), online.targets(chosen, IDS[chosen])
        assert not isinstance(expected, torch.Tensor)
        torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
        same = (found.ids == expected.ids).float().mean()
        assert same > 0.99  # equals may be in another order


@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
def test_the_most_likely_tokens_are_those_of_the_teacher_in_memory(tiny: Tiny, tmp_path: Path) -> None:
    model = wrap_model(tiny_model(tiny))
    check(stored(model, tmp_path), model)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_a_streamed_teacher_says_the_same(family: str, tmp_path: Path) -> None:
    plain = tiny_model(Tiny(family, 0))
    folder = save_tiny(plain, tmp_path / "model", max_shard_size="20KB")
    check(stored(load_streamed(find_source(folder), "float32"), tmp_path / "kept"), wrap_model(plain))


def test_what_was_stored_is_not_computed_again(tmp_path: Path) -> None:
    model = wrap_model(tiny_model(Tiny("llama", 0)))
    stored(model, tmp_path)
    kept = {shard: shard_file(tmp_path, shard).stat().st_mtime_ns for shard in range(3)}
    shard_file(tmp_path, 1).unlink()
    check(stored(model, tmp_path), model)
    after = {shard: shard_file(tmp_path, shard).stat().st_mtime_ns for shard in range(3)}
    assert [after[shard] == kept[shard] for shard in range(3)] == [True, False, True]
    assert not list(tmp_path.glob("*.partial"))


def test_other_sequences_and_settings_are_refused(tmp_path: Path) -> None:
    model = wrap_model(tiny_model(Tiny("llama", 0)))
    stored(model, tmp_path)
    with pytest.raises(UserError, match="another sequences"):
        stored(model, tmp_path, IDS.flip(0))
    with pytest.raises(UserError, match="another top_k"):
        stored(model, tmp_path, top_k=4)


def test_a_teacher_is_left_in_the_mode_it_was_in() -> None:
    model = random_model("gpt2", **Tiny("gpt2", 0).settings).train()
    OnlineTeacher(wrap_model(model)).targets(torch.tensor([0]), IDS[:1])
    assert model.training
