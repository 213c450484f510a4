"""Uploads files to a model repository of the Hugging Face Hub, in one commit."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from sglp_llm.errors import UserError

ATTEMPTS = 5
LONGEST_WAIT = 300.0
"""Seconds; the Hub counts requests over windows of this length."""

# What git allows in no name, see git-check-ref-format.
_NO_BRANCH = re.compile(r"[\s\x00-\x1f\x7f~^:?*\[\\]|\.\.|//|@\{|/\.|^[-/.]|[/.]$|\.lock$|^@$")

Notify = Callable[[str], None]
_Result = TypeVar("_Result")


class UploadError(RuntimeError):
    """An upload failed. The message says why, in one line and without the token."""


@dataclass(frozen=True)
class Upload:
    """What was uploaded, and where it is.

    Attributes:
        address: Of the model, of its branch where one was named.
        repository: ``OWNER/NAME``.
        revision: The branch.
        commit: The commit that holds the files.
    """

    address: str
    repository: str
    revision: str
    commit: str


def upload(
    files: Mapping[str, Path | bytes],
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    message: str,
    replaced: Sequence[str] = (),
    notify: Notify = lambda _: None,
) -> Upload:
    """Creates the model repository, and the branch, where they do not exist yet, and makes one commit.

    What is worth it is tried again, up to `ATTEMPTS` times: broken connections, too many requests (429), failures of the server
    (5xx). Large files that are on the Hub already are not sent again, after a failure as little as when the process was killed.

    Args:
        files: The content of each file, by its path in the repository.
        repo: ``OWNER/NAME``, or ``NAME`` of the user's own.
        revision: A branch; none = the main one.
        private: Make a new repository private; one that exists must be.
        message: Of the commit.
        replaced: Patterns of files at the root that the commit removes where ``files`` has none of that name.
        notify: Is told in one line why and when it will be tried again.

    Raises:
        UploadError: For whatever reason.
    """
    try:
        with _quiet():
            return _repeated(lambda: _upload(files, repo, revision, private, message, replaced), notify)
    except Exception as error:  # whatever the cause, the files are whole and the remedy is the same
        raise UploadError(_reason(error)) from error


def _upload(
    files: Mapping[str, Path | bytes],
    repo: str,
    revision: str | None,
    private: bool,
    message: str,
    replaced: Sequence[str],
) -> Upload:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    created = api.create_repo(repo, private=private or None, exist_ok=True)
    name = created.repo_id
    if private and not api.model_info(name).private:
        raise UploadError(f"{name} exists and is public: make it private on the Hub, or leave out --private")
    # Pull requests have no branch to be created.
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(name, branch=revision, exist_ok=True)
    there = api.list_repo_files(name, revision=revision)
    old = [path for path in there if path not in files and "/" not in path]
    obsolete = [path for path in old if any(fnmatch(path, pattern) for pattern in replaced)]
    # New operations each time: they ask the Hub what it has, so that a commit whose answer was lost is not made twice.
    # create_commit, because upload_folder may divide a large folder between several commits.
    removed = [CommitOperationDelete(path, is_folder=False) for path in obsolete]
    added = [CommitOperationAdd(path, str(each) if isinstance(each, Path) else each) for path, each in files.items()]
    commit = api.create_commit(name, [*removed, *added], commit_message=message, revision=revision)
    address = str(created) if revision is None else f"{created}/tree/{revision}"
    return Upload(address, name, revision or "main", commit.oid)


def _repeated(attempt: Callable[[], _Result], notify: Notify) -> _Result:
    for number in range(1, ATTEMPTS):
        try:
            return attempt()
        except Exception as error:
            if not _is_worth_another(error):
                raise
            wait = min(LONGEST_WAIT, max(2.0**number, _asked_wait(error)))
            notify(f"{_reason(error)}; trying again in {wait:g} s")
            time.sleep(wait)
    return attempt()


def _is_worth_another(error: BaseException) -> bool:
    """Whether it may be gone at the next attempt."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return False
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code in (408, 429) or cause.response.status_code >= 500
        # An answer that is no JSON is the error page of something before the Hub.
        if isinstance(cause, ConnectionError | TimeoutError | json.JSONDecodeError):
            return True
        # By name, because releases of huggingface_hub differ in the HTTP library that they use.
        names = {each.__name__ for each in type(cause).__mro__}
        if "TransportError" in names:
            return not names & {"LocalProtocolError", "UnsupportedProtocol"}
    return False


def _asked_wait(error: BaseException) -> float:
    """The seconds that the Hub asks to wait for, or 0."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            headers: Mapping[str, str] = cause.response.headers
            limit = headers.get("ratelimit", "").replace(" ", "")
            found = re.fullmatch(r"(\d+)", headers.get("retry-after", "")) or re.search(r";t=(\d+)", limit)
            return float(found[1]) if found else 0.0
    return 0.0


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _reason(error: BaseException) -> str:
    """One line, without the token and without the signatures of addresses."""
    from huggingface_hub import get_token

    causes = list(_causes(error))
    if isinstance(causes[0], json.JSONDecodeError):
        return "the Hub's answer is not JSON"
    # "Error while uploading FILE to the Hub." says no reason itself.
    said = causes[:2] if type(causes[0]) is RuntimeError else causes[:1]
    text = " ".join(" ".join(str(each).split()) or type(each).__name__ for each in said)
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
    return text.replace(token, "TOKEN") if (token := get_token()) else text


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of the library's own attempts: here one line says how it ended."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def full_name(repo: str) -> str:
    """``OWNER/NAME`` of a repository; without an owner it is the user's own.

    Raises:
        UploadError: The Hub did not say who the user is.
    """
    from huggingface_hub import HfApi

    if "/" in repo:
        return repo
    try:
        with _quiet():
            return f"{_repeated(HfApi().whoami, lambda _: None)['name']}/{repo}"
    except Exception as error:
        raise UploadError(_reason(error)) from error


def check_repository(repo: str) -> None:
    """Refuses, before any work is done, a repository that cannot be uploaded to.

    Raises:
        UserError: The name is not of the form NAME or OWNER/NAME, or nobody is logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"the Hub repository: {' '.join(str(error).split())}") from None
    try:
        known = get_token() is not None
    except Exception as error:  # a token that must be fetched, in a continuous integration
        raise UserError(f"{repo}: the login to the Hub failed ({' '.join(str(error).split())})") from None
    if not known:
        raise UserError(f"{repo}: nobody is logged in to the Hub: run `hf auth login`, or set HF_TOKEN")


def check_revision(revision: str | None) -> None:
    """Refuses a name that cannot be a branch.

    Raises:
        UserError: It is a commit, or git allows no such name.
    """
    if revision is None:
        return
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(f"--revision {revision}: is a commit, and nothing can be added to one: give a branch")
    if not revision or _NO_BRANCH.search(revision):
        raise UserError(f"--revision {revision!r}: cannot be the name of a branch")
