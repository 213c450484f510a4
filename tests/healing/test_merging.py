"""A PEFT adapter merged into its base model and pruned, against peft's own model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import copied, edited, logits, run_cli, save_tiny, without
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

IDS = torch.arange(12)[None] + 3


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    base = save_tiny(folder / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def test_the_merged_model_is_pruned(adapter: Path, tmp_path: Path) -> None:
    merged, out = tmp_path / "merged", tmp_path / "out"
    outcome = run_cli("prune", adapter, "--merge-adapter", merged, "--plan", "1,3", "--output", out)
    assert outcome.code == 0, outcome.err
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    layers = model.base_model.model.model.layers
    with torch.inference_mode():
        whole = model(IDS, use_cache=False).logits
        handles = [layers[index].register_forward_hook(lambda _, args, output: args[0]) for index in (1, 3)]
        expected = model(IDS, use_cache=False).logits
    assert len(handles) == 2
    torch.testing.assert_close(logits(merged), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(out), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(adapter.parent / "base"), whole, atol=1e-2)
    assert (out / "tokenizer.json").read_bytes() == (adapter.parent / "base" / "tokenizer.json").read_bytes()


def test_without_the_option_it_is_refused(adapter: Path, tmp_path: Path) -> None:
    outcome = run_cli("prune", adapter, "--plan", "1", "--output", tmp_path / "out")
    assert outcome.code == 2
    assert "--merge-adapter FOLDER" in outcome.error


def test_what_cannot_be_merged_is_one_line(adapter: Path, tmp_path: Path) -> None:
    prompts = get_peft_model(
        AutoModelForCausalLM.from_pretrained(adapter.parent / "base"),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    )
    prompts.save_pretrained(tmp_path / "prompts")
    nameless = copied(adapter, tmp_path / "nameless", edited("adapter_config.json", base_model_name_or_path=None))
    lacking = copied(adapter, tmp_path / "lacking", without("adapter_model.safetensors"))
    cases = {
        adapter.parent / "base": "not the folder of a PEFT adapter",
        nameless: "must name its base model",
        lacking: "peft cannot merge it",
        tmp_path / "prompts": "peft cannot merge it",
    }
    for number, (folder, what) in enumerate(cases.items()):
        merged = tmp_path / f"merged{number}"
        outcome = run_cli("prune", folder, "--merge-adapter", merged, "--plan", "1", "--output", tmp_path / "out")
        assert outcome.code == 2, folder
        assert what in outcome.error, outcome.error
        assert not merged.exists()
    assert not (tmp_path / "out").exists()
