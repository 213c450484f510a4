"""The contract of every file in adapters/, on tiny random checkpoints; a new family is picked up without an edit here.

The oracle is plain transformers: the source model with the removed layers' ``forward`` replaced by a pass-through that is
written in the tests. In float32 the exported model must give the same logits bit for bit.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import (
    REMOVED,
    Tiny,
    assert_cache_changes_nothing,
    every_tiny,
    files_of,
    kept_without,
    load_plain,
    logits_of,
    save_tiny,
    shortened_logits,
    tensors_of,
    tiny_model,
    write_plan,
)
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from sglp_llm import analyze, load_plan, prune
from sglp_llm.adapters.structure import config_keys


@dataclass
class Family:
    """What the tests of one tiny configuration share; nobody changes it."""

    tiny: Tiny
    model: PreTrainedModel
    folder: Path
    source: Path
    sharded: Path
    expected: torch.Tensor

    @property
    def kept(self) -> list[int]:
        return kept_without(self.tiny.depth, REMOVED)

    def prune(self, source: Path, name: str, **options: Any) -> Path:
        """Exports by a plan that a person wrote; once, whoever asks."""
        output = self.folder / name
        if not output.exists():
            plan = load_plan(write_plan(self.folder / f"{name}.json", self.tiny.depth, removed=list(REMOVED)))
            prune(source, output, plan=plan, **options)
        return output


@pytest.fixture(scope="module", params=every_tiny(), ids=str)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    tiny: Tiny = request.param
    folder = tmp_path_factory.mktemp(str(tiny))
    model = tiny_model(tiny)
    return Family(
        tiny,
        model,
        folder,
        save_tiny(model, folder / "single"),
        save_tiny(model, folder / "sharded", max_shard_size="60KB"),
        shortened_logits(load_plain(folder / "single"), tiny.adapter.layers, REMOVED),
    )


def new_name(name: str, path: str, kept: list[int]) -> str | None:
    """The name in the export by splitting at dots; ``path`` is the decoder layers' in the file."""
    before, found, after = f".{name}".partition(f".{path}.")
    if not found or before:
        return name
    index, rest = after.split(".", 1)
    return f"{path}.{kept.index(int(index))}.{rest}" if int(index) in kept else None


def assert_copied(export: Path, source: Path, path: str, kept: list[int]) -> None:
    """Every tensor that stays, in the file where it was, with the bits it had; and no other."""
    expected = []
    for file in files_of(source):
        named = {new_name(name, path, kept): tensor for name, tensor in file.items()}
        named.pop(None, None)
        if named:
            expected.append(named)
    written = files_of(export)
    assert [set(file) for file in written] == [set(file) for file in expected]
    for ours, theirs in zip(written, expected, strict=True):
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype
            assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


def layer_lists(config: PreTrainedConfig, depth: int) -> dict[str, list[object]]:
    return {key: value for key, value in config.to_dict().items() if isinstance(value, list) and len(value) == depth}


def test_the_adapter_says_where_things_are(family: Family) -> None:
    adapter, depth = family.tiny.adapter, family.tiny.depth
    layers = family.model.get_submodule(adapter.layers)
    assert isinstance(layers, nn.ModuleList)
    assert len(layers) == depth == getattr(family.model.config, adapter.depth_key)
    matches = {name: adapter.layer_key_pattern.match(name) for name in tensors_of(family.source)}
    assert {int(match[2]) for match in matches.values() if match} == set(range(depth))
    for name, match in matches.items():
        assert (match is not None) == name.startswith(f"{adapter.layers}."), name
        if match:
            assert match[1] + match[2] + match[3] == name
            assert match[1] == f"{adapter.layers}."


def test_no_list_with_an_entry_a_layer_is_undeclared(family: Family) -> None:
    assert set(layer_lists(family.model.config, family.tiny.depth)) <= config_keys.PER_LAYER
    outer = {key for key, value in vars(family.model.config).items() if isinstance(value, PreTrainedConfig)}
    assert not outer, "a nested configuration: its depth and its lists would have to follow too"


def test_the_removed_layers_matter(family: Family) -> None:
    """Without this the other tests could pass by accident."""
    for layer in range(family.tiny.depth):
        difference = logits_of(family.model) - shortened_logits(family.model, family.tiny.adapter.layers, (layer,))
        assert difference.abs().max() > 1e-3 * logits_of(family.model).abs().max(), layer


def test_the_kept_lists_are_not_what_transformers_would_derive(family: Family) -> None:
    """Without this an export that forgets the lists could pass."""
    lists = layer_lists(family.model.config, family.tiny.depth)
    settings = {**family.tiny.settings, family.tiny.adapter.depth_key: len(family.kept)}
    derived = AutoConfig.for_model(family.tiny.family, **settings)
    for key, entries in lists.items():
        if len(set(entries)) > 1:
            assert getattr(derived, key) != [entries[layer] for layer in family.kept]


@pytest.mark.parametrize("stored", ["single", "sharded"])
def test_export_computes_what_the_source_does_without_the_layers(family: Family, stored: str) -> None:
    export = family.prune(family.folder / stored, f"{stored}-out", verify=stored == "single")
    assert torch.equal(logits_of(load_plain(export)), family.expected)


@pytest.mark.parametrize("stored", ["single", "sharded"])
def test_export_copies_the_bits(family: Family, stored: str) -> None:
    source = family.folder / stored
    assert (len(files_of(source)) >= 3) == (stored == "sharded")
    assert_copied(
        family.prune(source, f"{stored}-out", verify=stored == "single"),
        source,
        family.tiny.adapter.layers,
        family.kept,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_export_copies_the_bits_of_half_precision(family: Family, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    source = save_tiny(tiny_model(family.tiny).to(dtype), family.folder / name)
    assert {tensor.dtype for tensor in tensors_of(source).values()} == {dtype}
    export = family.prune(source, f"{name}-out", verify=dtype == torch.bfloat16)
    assert_copied(export, source, family.tiny.adapter.layers, family.kept)
    assert load_plain(export).dtype == dtype


def test_max_shard_size_gives_a_right_index(family: Family) -> None:
    export = family.prune(family.source, "resharded", max_shard_size="50KB", verify=False)
    index = json.loads((export / "model.safetensors.index.json").read_text())
    files = {path.name: file for path, file in zip(sorted(export.glob("*.safetensors")), files_of(export), strict=True)}
    assert len(files) >= 3
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files.values() for t in file.values())
    for tensors in files.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 50_000
    assert torch.equal(logits_of(load_plain(export)), family.expected)


def test_export_generates_with_the_cache_as_without(family: Family) -> None:
    assert_cache_changes_nothing(load_plain(family.prune(family.source, "single-out")))


def test_exported_configuration_follows_the_layers(family: Family, tmp_path: Path) -> None:
    adapter, kept = family.tiny.adapter, family.kept
    before, export = AutoConfig.from_pretrained(family.source), family.prune(family.source, "single-out")
    exported = AutoConfig.from_pretrained(export)
    exported.save_pretrained(tmp_path)
    unlike = {*config_keys.PATTERN_OF, "_name_or_path"}
    for config in (exported, AutoConfig.from_pretrained(tmp_path)):
        changed = {adapter.depth_key: len(kept)}
        for key, entries in layer_lists(before, family.tiny.depth).items():
            changed[key] = [entries[layer] for layer in kept]
        for key in config_keys.FRONT & set(before.to_dict()):
            changed[key] = len([layer for layer in kept if layer < getattr(before, key)])
        same = {key: value for key, value in before.to_dict().items() if key not in unlike}
        ours = {key: value for key, value in config.to_dict().items() if key not in unlike}
        assert ours == {**same, **changed}


def test_configuration_without_the_lists_as_older_releases_wrote_it(family: Family) -> None:
    """Only what the family's tiny configuration says; transformers derives every list from that."""
    source = save_tiny(family.model, family.folder / "older")
    plain = {"model_type": family.tiny.family, "architectures": [type(family.model).__name__], **family.tiny.settings}
    (source / "config.json").write_text(json.dumps(plain))
    export = family.prune(source, "older-out", verify=False)
    before, after = AutoConfig.from_pretrained(source), AutoConfig.from_pretrained(export)
    for key, entries in layer_lists(before, family.tiny.depth).items():
        assert getattr(after, key) == [entries[layer] for layer in family.kept]
    assert torch.equal(logits_of(load_plain(export)), family.expected)


def test_checkpoint_of_the_bare_decoder(family: Family) -> None:
    """gpt2 and opt on the Hub were saved from the decoder alone: names lack the first component (but not a head's)."""
    source = save_tiny(family.model, family.folder / "bare")
    outer, inner = family.tiny.adapter.layers.split(".", 1)
    stripped = {name.removeprefix(f"{outer}."): tensor for name, tensor in tensors_of(source).items()}
    assert not any(name.startswith(f"{outer}.") for name in stripped)
    save_file(stripped, source / "model.safetensors", {"format": "pt"})
    export = family.prune(source, "bare-out")
    assert_copied(export, source, inner, family.kept)
    assert torch.equal(logits_of(load_plain(export)), family.expected)


def test_analysis_gives_finite_scores(family: Family) -> None:
    analysis = analyze(family.source, preset="paper", calibration="pydoc", samples=3, seq_len=24, drop=2)
    assert set(analysis.plan.scores) == {"gradnorm", "cka_column_sum"}
    for scores in analysis.plan.scores.values():
        assert len(scores) == family.tiny.depth
        assert all(math.isfinite(score) for score in scores)
    assert all(score > 0 for score in analysis.plan.scores["gradnorm"])
    assert len(analysis.plan.removed) == 2
    assert analysis.calibration_loss is not None
    assert analysis.calibration_loss > 0
    assert analysis.params_before == family.model.num_parameters()
