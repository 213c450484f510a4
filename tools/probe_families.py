"""Removes layers from a tiny random model of every causal type of the installed transformers, and writes docs/families.md.

    python tools/probe_families.py                  # every type, about an hour on one core
    python tools/probe_families.py llama jamba      # these only; the rest of the table stays

Of each type a checkpoint of eight decoder layers is written by transformers and pruned by four plans: two layers in the middle,
the first, the last, and three that break every regular pattern. What comes out is loaded by plain transformers and compared with
the original, whose removed layers return their input here: logits within 1e-6 of the largest, and the logits of greedy generation
with the cache against those without. Then it is analysed and pruned by `--criterion sglp`, without compensation and with three,
whose new values the original gets here. Each type runs in a process of its own with a time limit, so that a crash is a line.
The results are kept in a table in the package, which ``sglp-llm ls adapters`` reads.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from tiny_types import DEPTH, tiny_config  # noqa: E402
from tiny_wrappers import WRAPPERS  # noqa: E402

from sglp_llm import prune  # noqa: E402
from sglp_llm.adapters import adapter_names, adapter_of, is_wrapper  # noqa: E402
from sglp_llm.adapters.structure.exceptions import EXCEPTIONS, Exceptions  # noqa: E402
from sglp_llm.adapters.structure.probed import TABLE  # noqa: E402
from sglp_llm.calibration.sequences import CalibrationSet, hash_of  # noqa: E402
from sglp_llm.errors import UserError  # noqa: E402
from sglp_llm.models import find_config, find_source  # noqa: E402
from sglp_llm.plan import plan_from_indices  # noqa: E402

REMOVALS = ((1, 3), (0,), (DEPTH - 1,), (2, 4, 5))
_QUICK = {"engine": "resident", "verify": False}
COMPENSATIONS: dict[str, dict[str, Any]] = {"none": {}, "linear": _QUICK, "scale": _QUICK, "learned": _QUICK}
"""The compensations, and settings beside them: memory predicted and the result reloaded by this package once are enough."""
SECONDS = 3600
"""The limit of one type: what hangs is stopped, what waits for a busy machine is not."""
_NO_METHOD = re.compile(r"refused: compensate (?P<method>\w+) does not work for this [^:]* model: (?P<why>[^;]*)")
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


WRAPPED = "a model of images and text, pruned whole; see above"


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


def pruned(source: Path, output: Path, model: PreTrainedModel, generates: bool, **settings: Any) -> str:
    """``exact``, ``refused: why`` or ``WRONG: what``; generation is compared where it can be. See `prune` for the settings."""
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
    if generates and not (difference := generation_difference(left)) <= 1e-3:
        return f"WRONG: generation with the cache differs by {difference:.2g}"
    return "exact"


def does_generate(model: PreTrainedModel) -> bool:
    """Whether generation with the cache is as without; some types differ, or do not generate, unpruned as well."""
    try:
        return generation_difference(model) <= 1e-3
    except Exception:
        return False


def probe(model_type: str, folder: Path) -> dict[str, Any]:
    """One type: its adapter, and what came of each removal."""
    written = "written" if model_type in adapter_names() else "derived"
    config = tiny_config(model_type)
    if is_wrapper(config) and not EXCEPTIONS.get(model_type, Exceptions()).refuse:
        return {"adapter": "derived", "why": WRAPPED, "removals": []}
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
    output, generates = folder / "pruned", does_generate(reloaded)
    removals = [
        pruned(source, output, reloaded, generates, plan=plan_from_indices(DEPTH, removed)) for removed in REMOVALS
    ]
    analyses = [
        pruned(source, output, reloaded, False, criterion="sglp", drop=2, compensate=method, **settings)
        for method, settings in COMPENSATIONS.items()
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


def verdict(outcomes: list[str]) -> str:
    """A few words for the outcomes of a type; empty without any."""
    if any(each.startswith("WRONG") for each in outcomes):
        return "wrong"
    exact = sum(each == "exact" for each in outcomes)
    return "" if not outcomes else "exact" if exact == len(outcomes) else f"{exact} of {len(outcomes)} exact"


def reasons_of(found: dict[str, Any]) -> str:
    """Why not every outcome is exact, each reason once."""
    methods: dict[str, list[str]] = {}
    for outcome in (found["why"], *found["removals"], *found.get("analyses", ())):
        if outcome and outcome != "exact":
            match = _NO_METHOD.match(outcome)
            reason, method = match.group("why", "method") if match else (outcome.removeprefix("refused: "), "")
            methods.setdefault(reason, []).append(method)
    return "; ".join(
        f"compensate {', '.join(names)}: {reason}" if any(names) else reason for reason, names in methods.items()
    )


def counts_of(results: dict[str, dict[str, Any]]) -> str:
    """How many types came out how."""
    removals = Counter(
        "whole models of images and text" if found["why"] == WRAPPED else verdict(found["removals"]) or found["adapter"]
        for found in results.values()
    )
    text = f"{len(results)} causal types; by plan {_listed(removals)}"
    for index, method in enumerate(COMPENSATIONS):
        with_it = Counter(found["analyses"][index].split(":")[0] for found in results.values() if found.get("analyses"))
        text += f"; by `--criterion sglp --compensate {method}` {_listed(with_it)}"
    return text


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def page(table: dict[str, Any]) -> str:
    """The text of docs/families.md."""
    results = table["types"]
    rows = "\n".join(
        f"| {name} | {found['adapter']} | {verdict(found['removals'])} | {verdict(found.get('analyses', []))} "
        f"| {reasons_of(found).replace('|', ' ')} |"
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
generate with the cache as without. Then two layers are chosen by `--criterion sglp`, with each of
{", ".join(f"`--compensate {method}`" for method in COMPENSATIONS)}; the logits are compared with those of the original with the
layers skipped and the new values in place. What is refused is refused before anything is written. Patterns that are off by
default in a type's configuration are not exercised, nor are real checkpoints. `sglp-llm ls adapters` prints what this page says.

Some layers must stay: because later layers read what they compute, because the cache counts tokens by them, or because they alone
are built as they are. The choice leaves them out with every criterion; the plan, the report and the model card name them.
Where transformers builds a layer by its index alone (jamba), the kept layers must keep the pattern: criteria that give scores and
`angular` choose among the removals that do, and criteria that remove one layer after the other are refused before they begin.
What is not known of a type is tried before an analysis: the model is built without its first, middle and last layer.

A checkpoint of a derived type may name code (`auto_map`) from before transformers had the type, if the classes have the names of
those that transformers has now. That code is not run, and the result does not name it.

Encoders (BERT and its relatives) have no next token to predict, which every loss here is about: they are refused.

## Models of images and text

Types that `AutoModelForImageTextToText` loads and that have a `text_config` are pruned whole: their decoder is analysed with
text, and the result is again the wrapper, with the vision tower and the files of its processor carried over bit for bit. The
reload check compares text logits. Tried, as tiny random models, in `tests/adapters/test_wrappers.py`:
{", ".join(sorted(WRAPPERS))}. What removed layers do to answers about images is not
measured by a calibration on text. Layers behind which features of an image are added (`deepstack_visual_indexes`) stay.

## Quantised checkpoints

`prune --plan` copies the tensors of a quantised checkpoint (GPTQ, AWQ, FP8, MXFP4, compressed-tensors, bitsandbytes) as they are,
and its settings that name modules of layers (`modules_to_not_convert`, `ignore`, `dynamic`, `llm_int8_skip_modules`) follow. Make
the plan on the unquantised model: gradients, compensation and training need its weights. There is no reload check then.

A plan applies to every sibling of the model that it was made for, quantised or fine-tuned: of the same type and depth, with
layers of the same sizes. A note says so. A plan that replaces weights applies to its own model alone.

## PEFT adapters

`sglp-llm prune ADAPTER --merge-adapter MERGED --output OUT` merges an adapter into its base model, writes that to `MERGED`, and
prunes it.

## Causal types

{said_of_the_run(table)}: {counts_of(results)}.

| model_type | adapter | by four plans | chosen by sglp | why not |
|---|---|---|---|---|
{rows}
"""


def said_of_the_run(table: dict[str, Any]) -> str:
    """When the types were probed, with which releases, and which of them again since."""
    text = f"One run over all types, {table['date']}, transformers {table['transformers']}, torch {table['torch']}"
    return f"{text}; run again since: {', '.join(table['again'])}" if table["again"] else text


def main() -> None:
    """Probes the types that are named, or all, and writes the table and the page."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    named = sys.argv[1:]
    before = (
        json.loads(TABLE.read_text(encoding="utf-8"))
        if named
        else {"date": str(date.today()), "again": [], "types": {}}
    )
    results = {name: found for name, found in before["types"].items() if name not in named}
    for model_type in named or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        found = results[model_type] = in_a_process(model_type)
        verdicts = f"{verdict(found['removals']):16} {verdict(found.get('analyses', [])):16}"
        print(f"{model_type:28} {found['adapter']:8} {verdicts} {reasons_of(found)}", flush=True)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    again = sorted({*before["again"], *named})
    table = {"date": before["date"], **versions, "again": again, "types": dict(sorted(results.items()))}
    print(counts_of(results))
    TABLE.write_text(f"{json.dumps(table, indent=1)}\n", encoding="utf-8")
    PAGE.write_text(page(table), encoding="utf-8")


if __name__ == "__main__":
    main()
