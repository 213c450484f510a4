"""Removes layers from a tiny random model of every causal type of the installed transformers, and writes docs/families.md.

    python tools/probe_families.py                  # every type, about a quarter of an hour on one core
    python tools/probe_families.py llama jamba      # these only; nothing is written

Of each type a checkpoint of eight decoder layers is written by transformers and pruned by four plans: two layers in the middle,
the first, the last, and three that break every regular pattern. What comes out is loaded by plain transformers and compared with
the original, whose removed layers return their input here: logits within 1e-6 of the largest, and the logits of greedy generation
with the cache against those without. Each type runs in a process of its own with a time limit, so that a crash is a line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from tiny_types import DEPTH, tiny_config  # noqa: E402

from sglp_llm import prune  # noqa: E402
from sglp_llm.adapters import adapter_names, adapter_of  # noqa: E402
from sglp_llm.calibration.sequences import CalibrationSet, hash_of  # noqa: E402
from sglp_llm.errors import UserError  # noqa: E402
from sglp_llm.models import find_config, find_source  # noqa: E402
from sglp_llm.plan import plan_from_indices  # noqa: E402

REMOVALS = ((1, 3), (0,), (DEPTH - 1,), (2, 4, 5))
COMPENSATIONS = ("none", "linear", "scale", "learned")
SECONDS = 240
PAGE = ROOT / "docs" / "families.md"


def random_model(config: Any) -> PreTrainedModel:
    """A model whose every parameter is random and large enough for every layer to matter; the same each time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape)
                parameter.copy_(0.2 * noise if parameter.ndim >= 2 else parameter + 0.1 * noise)
    return model.eval()


def token_ids(rows: int = 2, tokens: int = 24) -> torch.Tensor:
    """``[rows, tokens]``, longer than the tiny sliding windows, without special tokens."""
    return torch.randint(3, 300, (rows, tokens), generator=torch.Generator().manual_seed(1))


@contextmanager
def returning_their_input(layers: torch.nn.ModuleList, removed: tuple[int, ...]) -> Iterator[None]:
    """The oracle of a removed layer: whatever it computes, it returns the hidden states that it was given."""

    def give_back(layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return type(output)([states, *output[1:]]) if isinstance(output, tuple | list) else states

    handles = [layers[index].register_forward_hook(give_back, with_kwargs=True) for index in removed]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(model: PreTrainedModel, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The oracle of a compensation: parameters with these values inside the block."""
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in values}
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
        try:
            yield
        finally:
            for name, value in before.items():
                parameters[name].copy_(value)


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """``[rows, tokens, vocabulary]``."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def generation_difference(model: PreTrainedModel, tokens: int = 10) -> float:
    """Largest difference of the logits of greedy generation with the cache and without, relative to the largest logit."""
    ids = token_ids(1, 12)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        cached = model.generate(ids, use_cache=True, **options)
        logits = logits_of(model, cached.sequences)[:, ids.shape[1] - 1 : -1]
    given = torch.stack(cached.logits, 1).float()
    return float((given - logits).abs().max() / logits.abs().max())


def calibration_set() -> CalibrationSet:
    """Enough random sequences to hold some out."""
    ids = token_ids(8)
    return CalibrationSet(ids, torch.ones_like(ids, dtype=torch.bool), "probe", 0, hash_of(ids, ids > 0), False)


def pruned(source: Path, output: Path, model: PreTrainedModel, **settings: Any) -> str:
    """``exact``, ``refused: why`` or ``WRONG: what``; see `prune` for the settings."""
    ids = token_ids()
    try:
        with _quiet_standard_error() as printed:
            made = prune(source, output, calibration=calibration_set(), overwrite=True, **settings)
    except UserError as error:
        return f"refused: {_short(error)}"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {_short(error)}"
    if text := printed():
        return f"WRONG: printed {text[:200]!r}"
    left, report = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    if odd := {kind: sorted(keys, key=str)[:2] for kind, keys in report.items() if keys}:
        return f"WRONG: {odd}"
    left = left.eval()
    layers, removed = model.get_submodule(adapter_of(model.config).layers), made.plan.removed
    with returning_their_input(layers, removed), replaced(model, made.plan.replaced):
        expected = logits_of(model, ids)
    difference = float((logits_of(left, ids) - expected).abs().max() / expected.abs().max().clamp(min=1))
    if not difference <= 1e-6:
        return f"WRONG: logits differ by {difference:.2g}"
    try:  # some types differ, or do not generate, unpruned as well
        unpruned = generation_difference(model)
    except Exception:
        return "exact"
    difference = generation_difference(left)
    if not difference <= 1e-3 and unpruned <= 1e-3:
        return f"WRONG: generation with the cache differs by {difference:.2g}"
    return "exact"


def probe(model_type: str, folder: Path) -> dict[str, Any]:
    """One type: its adapter, and what came of each removal."""
    written = "written" if model_type in adapter_names() else "derived"
    config = tiny_config(model_type)
    raw = {**config.to_dict(), "model_type": model_type}
    (folder / "config.json").write_text(json.dumps(raw, default=str), encoding="utf-8")
    try:
        find_config(folder)
    except UserError as error:
        return {"adapter": "refused", "why": _short(error), "removals": []}
    model = random_model(config)
    source = folder / "source"
    model.save_pretrained(source)
    try:
        find_source(source)
    except UserError as error:
        return {"adapter": "refused", "why": _short(error), "removals": []}
    reloaded = AutoModelForCausalLM.from_pretrained(source).eval()
    output = folder / "pruned"
    removals = [pruned(source, output, reloaded, plan=plan_from_indices(DEPTH, removed)) for removed in REMOVALS]
    analyses = [
        pruned(source, output, reloaded, criterion="sglp", compensate=compensate, drop=2)
        for compensate in COMPENSATIONS
    ]
    return {"adapter": written, "why": "", "removals": removals, "analyses": analyses}


@contextmanager
def _quiet_standard_error() -> Iterator[Callable[[], str]]:
    """Inside the block what this process, its libraries' C code included, prints to standard error is kept instead."""
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        kept: list[bytes] = []
        try:
            yield lambda: " ".join(b"".join(kept).decode(errors="replace").split())
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            kept.append(file.read())


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    for part in text.split():
        if part.startswith(tempfile.gettempdir()):
            text = text.replace(f"{part} ", "").replace(part, "")
    return text[:300]


def in_a_process(model_type: str) -> dict[str, Any]:
    """`probe` in a process of its own."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(SECONDS)
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = probe(model_type, Path(folder))
        except BaseException as error:
            found = {"adapter": "failed", "why": f"{type(error).__name__}: {_short(error)}", "removals": []}
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"adapter": "failed", "why": "crashed, or took too long", "removals": []}


def verdict(found: dict[str, Any]) -> str:
    """One word for a type."""
    removals = found["removals"]
    if not removals:
        return found["adapter"]
    if any(each.startswith("WRONG") for each in removals):
        return "wrong"
    exact = sum(each == "exact" for each in removals)
    return "exact" if exact == len(removals) else f"{exact} of {len(removals)} exact"


def reasons_of(found: dict[str, Any]) -> str:
    """Why not every removal is exact, each reason once."""
    return "; ".join(dict.fromkeys(each for each in (found["why"], *found["removals"]) if each and each != "exact"))


def page(results: dict[str, dict[str, Any]]) -> str:
    """The text of docs/families.md."""
    counts = Counter(verdict(found) for found in results.values())
    rows = "\n".join(
        f"| {name} | {found['adapter']} | {verdict(found)} | {reasons_of(found).replace('|', ' ')} |"
        for name, found in results.items()
    )
    return f"""# Which models can be pruned

Layers can be removed from any decoder-only language model of transformers, except where the table says why not. A family with a
file in `sglp_llm/adapters/` is *written*. Every other one is *derived*: its layers are found in the model built without weights,
its configuration follows one table of keys, and before anything is written the shortened model is built without weights too and
compared with the original, module by module. The logits of the result are compared with the original's in both cases.

`python tools/probe_families.py` makes this page; run it after an update of transformers. It prunes a tiny random model of
{DEPTH} layers by four plans: {", ".join(str(list(removed)) for removed in REMOVALS)} removed. *exact* means that all four results
load in plain transformers, give the original's logits with the layers skipped (float32, within 1e-6 of the largest), and
generate with the cache as without. A removal that is refused is refused before anything is written. Patterns that are off by
default in a type's configuration are not exercised, nor are real checkpoints.

transformers {transformers.__version__}, torch {torch.__version__.partition("+")[0]}: {len(results)} causal types,
{", ".join(f"{count} {kind}" for kind, count in counts.most_common())}.

| model_type | adapter | removals | why not |
|---|---|---|---|
{rows}
"""


def main() -> None:
    """Probes the types that are named, or all, and then writes the page."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    named = sys.argv[1:]
    results = {}
    for model_type in named or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        found = results[model_type] = in_a_process(model_type)
        print(f"{model_type:28} {found['adapter']:8} {verdict(found):16} {reasons_of(found)}", flush=True)
    counts = Counter(verdict(found) for found in results.values())
    print(f"{len(results)} types: {', '.join(f'{count} {kind}' for kind, count in counts.most_common())}")
    if not named:
        PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
