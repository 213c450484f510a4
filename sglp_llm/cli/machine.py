"""What this machine has for the verbs, and what it lacks."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from sglp_llm.calibration.cache import cache_folder
from sglp_llm.cli.console import print_table
from sglp_llm.errors import UserError
from sglp_llm.evaluation.suites import DATA_VARIABLE
from sglp_llm.memory.free import free_memory
from sglp_llm.models.modes import has_fast_bfloat16
from sglp_llm.onwards.gguf import find_converter
from sglp_llm.sizes import show_bytes
from sglp_llm.version import __version__

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HUB_SECONDS = 3.0


def machine() -> dict[str, Any]:
    """Versions, devices, memory in bytes, caches, the Hub, and what is missing for each verb; plain data for ``--json``."""
    hub = _hub()
    return {
        "versions": {"sglp-llm": __version__, "python": platform.python_version(), **_versions()},
        "devices": [_device(torch.device("cpu"), platform.processor() or platform.machine()), *_gpus()],
        "fast_bfloat16": has_fast_bfloat16(),
        "memory": {"host_free": free_memory().host, "cores": _cores(), "threads": torch.get_num_threads()},
        "caches": {"hub": _disk(_hub_cache()), "sglp-llm": _disk(cache_folder())},
        "hub": hub,
        "missing": _missing(hub),
    }


def print_machine(found: dict[str, Any]) -> None:
    """The same as tables."""
    print_table(
        "Versions",
        ["package", "version", "wanted"],
        [
            [name, it, ""] if isinstance(it, str) else [name, it["version"] or "not installed", it["wanted"]]
            for name, it in found["versions"].items()
        ],
    )
    print()
    rows = []
    for device in found["devices"]:
        free = device["free"]
        rows.append(
            [device["device"], device["name"], " ".join(device["dtypes"]), "?" if free is None else show_bytes(free)]
        )
    print_table("Devices", ["device", "name", "computes in", "free"], rows)
    print(
        f"\nbfloat16          {'faster' if found['fast_bfloat16'] else 'not faster'} than float32 where layers are tried"
    )
    print(f"Cores             {found['memory']['cores']}, of which torch uses {found['memory']['threads']}")
    for name, cache in found["caches"].items():
        held = f"{show_bytes(cache['bytes'])} there, " if cache["bytes"] is not None else ""
        free = "unknown" if cache["free"] is None else show_bytes(cache["free"])
        print(f"Cache             {name}: {cache['path']} ({held}{free} free on its disk)")
    hub = found["hub"]
    print(f"Hub               {hub['endpoint']}: {hub['state']}; {'a token is set' if hub['token'] else 'no token'}")
    print()
    rows = [[verb, line] for verb, lines in found["missing"].items() for line in lines or ["nothing is missing"]]
    print_table("Missing", ["verb", ""], rows)


def _versions() -> dict[str, Any]:
    """Every package that the program and its extras for users name: what is installed, and what is wanted."""
    found = {}
    for requirement in _requirements():
        there = _installed(requirement.name)
        extra = f" (extra {requirement.extra})" if requirement.extra else ""
        found[requirement.name] = {
            "version": there,
            "wanted": f"{requirement.specifier}{extra}",
            "fits": there is not None and requirement.specifier.contains(there, prereleases=True),
        }
    return found


class _Wanted:
    """A requirement and the extra that brings it; empty for none."""

    def __init__(self, text: str) -> None:
        requirement = Requirement(text)
        self.name, self.specifier = requirement.name, requirement.specifier
        marker = str(requirement.marker or "")
        self.extra = marker.partition("extra ==")[2].strip(" \"'") if "extra ==" in marker else ""


def _requirements() -> list[_Wanted]:
    try:
        texts = requires("sglp-llm") or []
    except PackageNotFoundError:  # a folder on the path, not an installed package
        texts = ["torch", "transformers"]
    return [each for each in map(_Wanted, texts) if each.extra in ("", "heal", "report")]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            devices.append(_device(torch.device("cuda", index), torch.cuda.get_device_name(index)))
    if torch.backends.mps.is_available():
        devices.append(_device(torch.device("mps"), "Apple GPU"))
    return devices


def _device(device: torch.device, name: str) -> dict[str, Any]:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory().host
    dtypes = [str(dtype).removeprefix("torch.") for dtype in _DTYPES if _takes(device, dtype)]
    return {"device": str(device), "name": name, "dtypes": dtypes, "free": free}


def _takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a matrix product and its gradient can be computed there."""
    try:
        matrix = torch.ones(8, 8, device=device, dtype=dtype, requires_grad=True)
        (matrix @ matrix).sum().backward()
    except (RuntimeError, TypeError):
        return False
    return matrix.grad is not None and bool(torch.isfinite(matrix.grad).all())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _disk(folder: Path) -> dict[str, Any]:
    there = next((place for place in (folder, *folder.parents) if place.exists()), None)
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()] if folder.is_dir() else []
    return {
        "path": str(folder),
        "bytes": sum(file.stat().st_size for file in files) if folder.is_dir() else None,
        "free": None if there is None else shutil.disk_usage(there).free,
    }


def _hub() -> dict[str, Any]:
    from huggingface_hub import constants, get_session, get_token

    state = "answers"
    if constants.HF_HUB_OFFLINE:
        state = "switched off (HF_HUB_OFFLINE)"
    else:
        try:
            get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
        except Exception:  # of whatever library the session is
            state = "does not answer"
    return {"endpoint": constants.ENDPOINT, "state": state, "token": get_token() is not None}


def _missing(hub: dict[str, Any]) -> dict[str, list[str]]:
    """By verb what it lacks, a line each, with what would mend it."""
    wanted = {each.name: each for each in _requirements()}
    lacking = [name for name, each in _versions().items() if not each["fits"] and not wanted[name].extra]
    everywhere = [
        f"{name} {wanted[name].specifier}: pip install -U '{name}{wanted[name].specifier}'" for name in lacking
    ]
    offline = hub["state"] != "answers"
    text = ["the Hub: name a local model, and --calibration pydoc, self or text:FILE"] if offline else []
    scored = ["the Hub: name a local model, and --data pydoc or text:FILE"] if offline else []
    if not os.environ.get(DATA_VARIABLE):
        scored.append(f"--suite offline: its files, in --data-dir DIR or ${DATA_VARIABLE}")
    plots = [] if _installed("matplotlib") else ["plots: pip install 'sglp-llm[report]'"]
    adapters = [] if _installed("peft") else ["--train lora: pip install 'sglp-llm[heal]'"]
    token = [] if hub["token"] else ["a token: hf auth login, or HF_TOKEN"]
    found = {
        "prune": text,
        "analyze": text,
        "replan": [],
        "heal": [*(["the Hub: name a local original, and --data pydoc or text:FILE"] if offline else []), *adapters],
        "eval": scored,
        "bench": [],
        "compare": [*text, *plots],
        "report": [],
        "export": _missing_for_export(),
        "push": [*(["the Hub"] if offline else []), *token],
        "plan-memory": [],
        "ls": [],
    }
    return {verb: [*everywhere, *lines] for verb, lines in found.items()}


def _missing_for_export() -> list[str]:
    lines = []
    try:
        find_converter()
    except UserError as error:
        lines.append(f"--to gguf, ollama: {error}")
    if shutil.which("ollama") is None:
        lines.append("--to ollama: ollama, to try what is written")
    if find_spec("vllm") is None:
        lines.append("--to vllm-draft: pip install vllm, to try what is written")
    return lines
