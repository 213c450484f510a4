"""The model card: what the Hub reads in it, and what a person does."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load, metadata_save

from sglp_llm.plan.published import PLACE
from sglp_llm.records import Footprint, ModelIdentity, PrunePlan
from sglp_llm.report.model_card import write_model_card
from sglp_llm.sizes import show_count

PLAN = PrunePlan(
    6,
    (0, 1, 2, 5),
    source=ModelIdentity("owner/name", "llama", "sha256:0"),
    revision="0123456789abcdef0123456789abcdef01234567",
    footprint=Footprint(2, 1000, (300,) * 6, (8,) * 6, (None,) * 6, 64),
    settings={"criterion": "bi", "calibration": "wikitext2 c4:2 text:/home/me/a.txt", "samples": 4, "seq_len": 16},
)
REPAIRED = replace(
    PLAN,
    replaced={"model.layers.2.mlp.down_proj.weight": torch.ones(2, 2)},
    compensation={"method": "linear", "losses": {"held_out": {"without": 4.0, "with": 3.5}}},
)
HEALING: dict[str, Any] = {
    "teacher": {"name": "/home/me/name", "model_type": "llama", "fingerprint": "sha256:0"},
    "data": "alpaca",
    "tokens": 4096,
    "parameters": 1234,
    "settings": {"train": "full", "seq_len": 32},
    "before": {"next_token_loss": 5.0, "divergence": 2.0},
    "after": {"next_token_loss": 3.0, "divergence": 1.0},
}


def card_of(folder: Path, plan: PrunePlan, healing: dict[str, Any] | None = None) -> ModelCard:
    write_model_card(folder / "README.md", plan, folder / "source" / "README.md", healing)
    return ModelCard.load(folder / "README.md")


def source_card(folder: Path, text: str) -> None:
    (folder / "source").mkdir()
    (folder / "source" / "README.md").write_text(text)


def test_what_the_hub_reads(tmp_path: Path) -> None:
    source_card(
        tmp_path, "---\nlicense: llama3.2\nlanguage:\n- en\n- de\ntags: [chat]\nbase_model: other/one\n---\n# One\n"
    )
    data = card_of(tmp_path, PLAN).data
    assert (data.base_model, data["base_model_relation"]) == ("owner/name", "finetune")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert (data.license, data.language, data.tags) == ("llama3.2", ["en", "de"], ["sglp-llm", "depth-pruning"])
    assert data.datasets == ["Salesforce/wikitext", "allenai/c4"]
    assert data.eval_results is None
    assert "model_name" not in (metadata_load(tmp_path / "README.md") or {})


def test_a_license_of_its_own_keeps_its_name_and_link(tmp_path: Path) -> None:
    source_card(tmp_path, "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n")
    data = card_of(tmp_path, PLAN).data
    assert (data.license, data.license_name, data.license_link) == ("other", "mine", "LICENSE")


@pytest.mark.parametrize(
    "text",
    ["", "no metadata", "---\n- a list\n---\n", "---\nlicense: [1\n---\n", "---\nlicense: 3\nlanguage: no\n---\n"],
)
def test_a_source_card_that_says_nothing_of_use(text: str, tmp_path: Path) -> None:
    source_card(tmp_path, text)
    data = card_of(tmp_path, PLAN).data
    assert (data.license, data.language) == (None, None)


def test_results_of_a_repair_and_of_a_training(tmp_path: Path) -> None:
    (repaired,) = card_of(tmp_path, REPAIRED).data.eval_results or []
    assert (repaired.metric_type, repaired.metric_value) == ("perplexity", round(math.exp(3.5), 4))
    # Several texts are not one data set.
    assert (repaired.dataset_type, repaired.dataset_name) == ("text", "wikitext2 c4:2 text:a.txt")
    card = card_of(tmp_path, REPAIRED, HEALING)
    (healed,) = card.data.eval_results or []
    assert (healed.metric_type, healed.metric_value) == ("perplexity", round(math.exp(3.0), 4))
    assert (healed.dataset_type, healed.dataset_name) == ("yahma/alpaca-cleaned", "alpaca")
    assert "32 tokens" in (healed.metric_name or "")
    assert card.data.datasets == ["Salesforce/wikitext", "allenai/c4", "yahma/alpaca-cleaned"]
    assert "| compensation linear | loss on held-out calibration text | 4.0000 | 3.5000 |" in card.text
    assert "| training | loss on held-out text | 5.0000 | 3.0000 |" in card.text
    # What huggingface_hub writes of what it has read is the same again.
    before = metadata_load(tmp_path / "README.md")
    metadata_save(tmp_path / "README.md", card.data.to_dict())
    assert metadata_load(tmp_path / "README.md") == before


def test_a_loss_that_has_no_perplexity(tmp_path: Path) -> None:
    losses = {"losses": {"held_out": {"without": 1.0, "with": 1e4}}}
    assert card_of(tmp_path, replace(REPAIRED, compensation=losses)).data.eval_results is None


def test_what_a_person_reads(tmp_path: Path) -> None:
    text = card_of(tmp_path, PLAN).text
    assert "[owner/name](https://huggingface.co/owner/name) with 2 of its 6 decoder layers removed" in text
    assert "- Removed layers (0-based, of the original): 3, 4\n" in text
    assert "the criterion `bi` on 4 x 16 tokens of `wikitext2 c4:2 text:a.txt`" in text
    assert "| decoder layers | 6 | 4 |" in text
    assert f"| parameters | {show_count(2800)} | {show_count(2200)} |" in text
    for command in (f'from_pretrained("{PLACE}")', f"vllm serve {PLACE}", f"pretrained={PLACE} --tasks"):
        assert command in text
    assert "## Limits" in text


@pytest.mark.parametrize("name", ["/home/me/some name", "../up/some name", "~/some name"])
def test_a_local_model_is_no_link_and_has_no_path(name: str, tmp_path: Path) -> None:
    local = replace(REPAIRED, source=replace(PLAN.source, name=name), revision=None)
    card = card_of(tmp_path, local, HEALING)
    assert card.data.base_model is None
    assert "base_model_relation" not in card.data
    assert "`some name` with 2 of its 6 decoder layers removed" in card.text
    content = (tmp_path / "README.md").read_text()
    assert not any(part in content for part in ("home", "/me", "../", "~/"))


def test_a_folder_of_the_hubs_cache_is_a_model_on_the_hub(tmp_path: Path) -> None:
    name = f"/home/me/.cache/huggingface/hub/models--owner--name/snapshots/{PLAN.revision}"
    assert (
        card_of(tmp_path, replace(PLAN, source=replace(PLAN.source, name=name), revision=None)).data.base_model
        == "owner/name"
    )
