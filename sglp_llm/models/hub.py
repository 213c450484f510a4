"""Reads checkpoints from the Hugging Face Hub, and only the files that are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sglp_llm.errors import UserError

# At the root of a repository only: subfolders hold the same weights again in other formats.
_SMALL_FILES = [
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
    "sglp_plan.tensors",  # without it the plan of a compensated model is not whole
]
# model.fp16.safetensors and the like are the same weights once more.
_NOT_NEEDED = ["*/*", "model.*.safetensors"]


def download(repo: str, revision: str | None, weights: bool = True, tokenizer: bool = False) -> tuple[Path, str]:
    """Downloads a checkpoint into the Hub's cache: safetensors files where there are any, otherwise PyTorch ``.bin`` files.

    Args:
        repo: ``OWNER/NAME``.
        revision: Branch, tag or commit.
        weights: False downloads the configuration alone.
        tokenizer: Downloads the small files alone, those of the tokenizer among them.

    Returns:
        The local folder, and the commit it holds.

    Raises:
        UserError: There is no such model or revision, it is gated, or the Hub cannot be reached and the cache lacks it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision!r}" if revision else ""
    try:
        for files in (["model*.safetensors"], ["pytorch_model*.bin"]):
            wanted = _SMALL_FILES + ([] if tokenizer else files) if weights else ["config.json"]
            folder = Path(
                snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=_NOT_NEEDED)
            )
            if tokenizer or not weights or any(folder.glob(files[0])):
                break
    except HFValidationError:
        raise UserError(
            f"{repo!r} is neither a folder, a .gguf file nor the name of a model on the Hub (OWNER/NAME)"
        ) from None
    except GatedRepoError:
        raise UserError(
            f"{repo}: the model is gated; accept its terms on the Hub and log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{repo}: the Hub has the model but no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{repo}: the Hub has no such model (or it is private: log in with `hf auth login`)") from None
    except Exception as error:  # no connection, a broken one, a full disk: each library has errors of its own
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"{repo}{at}: no such folder or file here, and it cannot be had from the Hub ({reason}); "
            "give a local folder or .gguf file, or check the name and the connection"
        ) from None
    return folder, folder.name


@contextmanager
def offline_when_unreachable() -> Iterator[None]:
    """Checks once whether the Hub can be reached; if not, the libraries used inside the block read their caches only.

    Otherwise each file costs six attempts and 23 seconds, with two warnings for each.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    before = constants.HF_HUB_OFFLINE
    try:
        if not before:
            get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # no DNS, no route, no answer, a proxy that refuses: the classes differ between versions
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
