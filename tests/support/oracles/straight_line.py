"""The criteria of others as a research script: plain transformers and torch, one naive loop each, nothing shared.

    python tests/oracles/straight_line.py --model FOLDER|FILE.gguf --ids ids.pt --drop 2

Prints JSON: for every criterion its scores (larger = keep; of the last step where it is greedy) and the removed layers.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div
from transformers import AutoModelForCausalLM

LISTS = ("model.layers", "model.decoder.layers", "transformer.h", "gpt_neox.layers")


def load(name):
    path = Path(name)
    if path.suffix == ".gguf":
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    return AutoModelForCausalLM.from_pretrained(path).eval()


def read_ids(file):
    if file.endswith(".pt"):
        return torch.load(file)
    if file.endswith(".npy"):
        import numpy

        return torch.from_numpy(numpy.load(file))
    return torch.tensor(json.loads(Path(file).read_text()))


def layers_of(model):
    for path in LISTS:
        try:
            return path, model.get_submodule(path)
        except AttributeError:
            continue
    raise ValueError(f"no decoder layers at any of {LISTS}")


@contextmanager
def without(model, removed):
    """The layers are really gone from the ModuleList, and the configuration and the indices say so."""
    path, layers = layers_of(model)
    parent, name = path.rsplit(".", 1)
    kept = [index for index in range(len(layers)) if index not in removed]
    config, old = model.config, copy.deepcopy(model.config.__dict__)
    places = [(part, part.layer_idx) for layer in layers for part in layer.modules() if hasattr(part, "layer_idx")]
    setattr(model.get_submodule(parent), name, torch.nn.ModuleList([layers[index] for index in kept]))
    config.num_hidden_layers = len(kept)
    for key in ("layer_types", "no_rope_layers"):
        if getattr(config, key, None):
            setattr(config, key, [getattr(config, key)[index] for index in kept])
    for new, index in enumerate(kept):
        for part in layers[index].modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = new
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), name, layers)
        config.__dict__.clear()
        config.__dict__.update(old)
        for part, index in places:
            part.layer_idx = index


def loss_of(model, row):
    logits = model(row[None], use_cache=False).logits[0]
    return cross_entropy(logits[:-1].float(), row[1:])


def mean_loss(model, ids, removed=()):
    with without(model, removed), torch.no_grad():
        return sum(float(loss_of(model, row)) for row in ids) / len(ids)


def depth(model):
    return len(layers_of(model)[1])


def ppl(model, ids):
    return [math.exp(mean_loss(model, ids, (layer,))) for layer in range(depth(model))]


def taylor(model, ids):
    model.zero_grad()
    for row in ids:
        loss_of(model, row).backward()
    scores = [
        sum(float((p.detach() * p.grad).abs().sum(dtype=torch.float64)) for p in layer.parameters() if p.ndim >= 2)
        for layer in layers_of(model)[1]
    ]
    model.zero_grad()
    return scores


def magnitude(model):
    return [
        sum(float(p.detach().abs().sum(dtype=torch.float64)) for p in layer.parameters() if p.ndim >= 2)
        for layer in layers_of(model)[1]
    ]


def states_of(model, row):
    """x_0 .. x_L of one sequence, ``[L + 1, tokens, hidden]``, taken at the layers themselves."""
    states = []

    def enter(module, args, kwargs):
        states.append((args[0] if args else kwargs["hidden_states"]).detach()[0])

    def leave(module, args, output):
        states.append((output[0] if isinstance(output, tuple) else output).detach()[0])

    layers = layers_of(model)[1]
    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(leave))
    with torch.no_grad():
        model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(states).double()


def bi(model, ids):
    cosines = [cosine_similarity(x[:-1], x[1:], dim=-1) for x in (states_of(model, row) for row in ids)]
    return (1 - torch.cat(cosines, dim=1).mean(dim=1)).tolist()


def angular(model, ids, drop):
    """One distance a start l with l + drop <= L: that of the block of layers l .. l + drop - 1."""
    distances = []
    for row in ids:
        x = states_of(model, row)[:, -1]
        cosine = cosine_similarity(x[:-drop], x[drop:], dim=-1).clamp(-1, 1)
        distances.append(torch.arccos(cosine) / math.pi)
    return torch.stack(distances).mean(dim=0).tolist()


def mean_kl(model, ids, dense, removed):
    total = 0.0
    with without(model, removed), torch.no_grad():
        for row, reference in zip(ids, dense, strict=True):
            pruned = model(row[None], use_cache=False).logits[0].double().log_softmax(-1)
            total += float(kl_div(pruned, reference, log_target=True, reduction="none").sum(-1).mean())
    return total / len(ids)


def greedy(model, drop, harm):
    """Removes the layer without which ``harm(removed)`` is least, and again; ties go to the lower index."""
    removed, trials = [], {}
    for _ in range(drop):
        trials = {layer: harm((*removed, layer)) for layer in range(depth(model)) if layer not in removed}
        removed.append(min(trials, key=lambda layer: (trials[layer], layer)))
    return {
        "scores": [trials.get(layer) for layer in range(depth(model))],
        "order": removed,
        "removed": sorted(removed),
    }


def sleb(model, ids, drop):
    return greedy(model, drop, lambda removed: mean_loss(model, ids, removed))


def kl(model, ids, drop):
    with torch.no_grad():
        dense = [model(row[None], use_cache=False).logits[0].double().log_softmax(-1) for row in ids]
    return greedy(model, drop, lambda removed: mean_kl(model, ids, dense, removed))


def lowest(scores, drop):
    return sorted(sorted(range(len(scores)), key=lambda layer: (scores[layer], layer))[:drop])


def everything(model, ids, drop):
    """Every criterion: ``{name: {"scores": [...], "removed": [...]}}``."""
    plain = {"ppl": ppl(model, ids), "taylor": taylor(model, ids), "magnitude": magnitude(model), "bi": bi(model, ids)}
    results = {name: {"scores": scores, "removed": lowest(scores, drop)} for name, scores in plain.items()}
    distances = angular(model, ids, drop)
    start = lowest(distances, 1)[0]
    results["angular"] = {"scores": distances, "removed": list(range(start, start + drop))}
    return {**results, "sleb": sleb(model, ids, drop), "kl": kl(model, ids, drop)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ids", required=True, help=".pt, .npy or .json with token ids [sequences, tokens]")
    parser.add_argument("--drop", type=int, required=True)
    given = parser.parse_args()
    print(json.dumps(everything(load(given.model), read_ids(given.ids).long(), given.drop), indent=2))
