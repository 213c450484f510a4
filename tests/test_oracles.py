"""The straight-line script runs, leaves the model as it was, and agrees with what is known by hand."""

from __future__ import annotations

import pytest
import torch
from checkpoints import tiny_model
from oracles import straight_line as oracle


def test_every_criterion_of_a_tiny_llama() -> None:
    model, ids = tiny_model(initializer_range=0.2), torch.arange(3, 39).view(3, 12)
    idle = model.model.layers[4]  # a layer that does nothing costs nothing, whatever the criterion on its output
    with torch.no_grad():
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
        before = model(ids, use_cache=False).logits
        loss = float(model(ids, labels=ids).loss)
    results = oracle.everything(model, ids, 2)
    assert set(results) == {"ppl", "taylor", "magnitude", "bi", "angular", "sleb", "kl"}
    assert all(len(result["removed"]) == 2 for result in results.values())
    assert all(4 in results[name]["removed"] for name in ("bi", "magnitude"))
    assert results["ppl"]["scores"][4] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-5)
    assert results["bi"]["scores"][4] == pytest.approx(0, abs=1e-9)
    assert results["kl"]["order"][0] == 4
    assert len(results["angular"]["scores"]) == 5
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, before)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(6))
    assert model.config.num_hidden_layers == 6
