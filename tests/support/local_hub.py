"""A Hugging Face Hub on this machine: the routes that huggingface_hub calls through ``HF_ENDPOINT``, without Xet."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from hub_metadata import metadata_errors

TOKEN = "hf_TheSecretOfThisTest"
USER = "me"
FIRST = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Stored:
    """A file of a commit."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        return hashlib.sha256(self.content).hexdigest() if self.lfs else git_hash(self.content)

    def entry(self, path: str) -> dict[str, Any]:
        size = len(self.content)
        lfs = {"lfs": {"oid": self.oid, "size": size, "pointerSize": 130}} if self.lfs else {}
        return {"type": "file", "path": path, "size": size, "oid": git_hash(self.content), **lfs}


@dataclass
class Repository:
    """Its commits, and the last one of each branch."""

    private: bool
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def add(self, branch: str, files: dict[str, Stored], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return {path: each.content for path, each in self.commits[self.branches[branch]].items()}


@dataclass
class Failure:
    """What happens instead of an answer, to requests ``METHOD PATH`` that match."""

    pattern: str
    status: int
    times: float
    headers: dict[str, str]
    after: bool = False


class Answer(Exception):
    """Ends a request."""

    def __init__(self, status: int, body: Any = b"", **headers: str) -> None:
        super().__init__(status)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body: bytes = body if isinstance(body, bytes) else json.dumps(body).encode()


class LocalHub:
    """The server's state, and what a test may ask of it.

    Attributes:
        address: To be used as ``HF_ENDPOINT``.
        storage: The address of large files.
        repositories: By name.
        objects: Large files by sha256, committed or not.
        requests: ``METHOD PATH`` of every request, in order.
        ranges: The header ``Range`` of every request that has one.
        received: The body of every request, in order.
        waits: The seconds that the client would have waited, where a test keeps it from waiting.
        hold_after: So many uploaded objects; further uploads wait.
        held: Set when one waits.
        released: Set to end their waiting, with a broken connection.
        cut: Downloads of objects end after so many bytes, once each.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.received: list[bytes] = []
        self.waits: list[float] = []
        self.failures: list[Failure] = []
        self.hold_after: int | None = None
        self.held, self.released, self.lock = threading.Event(), threading.Event(), threading.Lock()
        self.cut: dict[str, int] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        # Another name of this machine: the Hub's large files are with another host, which must not be sent the token.
        self.address, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def fail(self, pattern: str, status: int, times: float = 1, after: bool = False, **headers: str) -> None:
        """Answers with this status, 0 for a broken connection; ``after`` the request was carried out."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.failures.append(Failure(pattern, status, times, named, after))

    def asked(self, pattern: str) -> list[str]:
        """Requests that match."""
        return [request for request in self.requests if re.search(pattern, request)]

    @contextmanager
    def running(self) -> Iterator[LocalHub]:
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path  # a branch "a/b" is one part of it, "a%2Fb"
        request = f"{self.command} {unquote(path)}"
        body = self._read()
        with hub.lock:
            hub.requests.append(request)
            hub.received.append(body)
            if "Range" in self.headers:
                hub.ranges.append(self.headers["Range"])
            failure = next((f for f in hub.failures if f.times > 0 and re.search(f.pattern, request)), None)
            if failure is not None:
                failure.times -= 1
        try:
            if failure is not None and not failure.after:
                raise Answer(failure.status, b"<html>failed</html>", **failure.headers)
            self._route(self.command, path, body)
        except Answer as given:
            answer = given if failure is None or not failure.after else Answer(failure.status, **failure.headers)
            self._answer(answer)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, answer: Answer) -> None:
        if answer.status == 0:
            self.close_connection = True
            return
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(answer.body)), **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        body = b"" if self.command == "HEAD" else answer.body
        whole = int(headers["Content-Length"])
        self.wfile.write(body)
        if self.command != "HEAD" and len(body) < whole:
            self.close_connection = True

    def _route(self, method: str, path: str, body: bytes) -> None:
        if method == "POST" and path == "/api/validate-yaml":
            self._validate(json.loads(body))
        if found := re.fullmatch(r"/objects/(\w{64})", path):
            self._object(method, found[1], body)
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*map(unquote, found.groups()))
        self._log_in(required=True) if method == "POST" or "whoami" in path else None
        if path == "/api/whoami-v2":
            raise Answer(200, {"type": "user", "name": USER, "orgs": []})
        if path == "/api/repos/create":
            self._create(json.loads(body))
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            self._repository(found[1])
            self._batch(json.loads(body))
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/([a-z-]+)(?:/(.+))?)?", path)
        if found is None:
            raise Answer(404, {"error": f"no route {path}"})
        name, what, rest = found.groups()
        revision, _, folder = (rest or "main").partition("/")
        if folder and what == "tree":
            raise Answer(404, {"error": "no such folder"}, X_Error_Code="EntryNotFound")
        answer = getattr(self, f"_{what or 'revision'}")
        answer(name, self._repository(name), unquote(revision), body)

    def _log_in(self, required: bool) -> bool:
        given = self.headers.get("Authorization")
        if given == f"Bearer {TOKEN}":
            return True
        if given is not None or required:
            raise Answer(
                401, {"error": "Invalid username or password."}, X_Error_Message="Invalid username or password."
            )
        return False

    def _repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._log_in(required=False)):
            raise Answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return found

    def _commit_of(self, repository: Repository, revision: str) -> str:
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise Answer(404, {"error": "Invalid rev"}, X_Error_Code="RevisionNotFound")
        return commit

    def _validate(self, sent: dict[str, str]) -> None:
        errors = metadata_errors(sent["content"])
        listed = [{"message": error} for error in errors]
        raise Answer(400 if errors else 200, {"errors": listed, "warnings": []})

    def _create(self, sent: dict[str, Any]) -> None:
        name = f"{sent['organization'] or USER}/{sent['name']}"
        url = {"url": f"{self.hub.address}/{name}"}
        with self.hub.lock:
            if name in self.hub.repositories:
                raise Answer(409, {"error": "You already created this model repo", **url})
            private = sent.get("visibility") == "private" or bool(sent.get("private"))
            repository = self.hub.repositories[name] = Repository(private)
            repository.add("main", {path: Stored(each, False) for path, each in FIRST.items()}, "initial commit")
        raise Answer(200, url)

    def _branch(self, _: str, repository: Repository, branch: str, __: bytes) -> None:
        if branch in repository.branches:
            raise Answer(409, {"error": "Reference already exists"})
        repository.branches[branch] = repository.branches["main"]
        raise Answer(201, {})

    def _revision(self, name: str, repository: Repository, revision: str, _: bytes) -> None:
        commit = self._commit_of(repository, revision)
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        raise Answer(200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings})

    def _tree(self, _: str, repository: Repository, revision: str, __: bytes) -> None:
        files = repository.commits[self._commit_of(repository, revision)]
        raise Answer(200, [each.entry(path) for path, each in files.items()])

    def _preupload(self, _: str, repository: Repository, revision: str, body: bytes) -> None:
        there = repository.commits[self._commit_of(repository, revision)]
        files = []
        for each in json.loads(body)["files"]:
            large = b"\0" in base64.b64decode(each["sample"]) or each["size"] > 10_000_000
            oid = there[each["path"]].oid if each["path"] in there else None
            mode = "lfs" if large else "regular"
            files.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise Answer(200, {"files": files})

    def _batch(self, sent: dict[str, Any]) -> None:
        def told(each: dict[str, Any]) -> dict[str, Any]:
            upload = {"upload": {"href": f"{self.hub.storage}/objects/{each['oid']}?X-Signature=signed"}}
            return each if each["oid"] in self.hub.objects else {**each, "actions": upload}

        raise Answer(200, {"transfer": "basic", "objects": [told(each) for each in sent["objects"]]})

    def _commit(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        if branch not in repository.branches:
            raise Answer(404, {"error": "Invalid rev"}, X_Error_Code="RevisionNotFound")
        files, message = dict(repository.commits[repository.branches[branch]]), ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Answer(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = Stored(self.hub.objects[value["oid"]], True)
            else:
                assert operation["key"] == "deletedFile"
                del files[value["path"]]
        commit = repository.add(branch, files, message)
        url = f"{self.hub.address}/{name}/commit/{commit}"
        raise Answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        commit = self._commit_of(repository, revision)
        found = repository.commits[commit].get(path)
        if found is None:
            raise Answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        size = str(len(found.content))
        if not found.lfs:
            raise Answer(200, found.content, X_Repo_Commit=commit, ETag=f'"{found.oid}"')
        linked = {"X_Linked_Etag": f'"{found.oid}"', "X_Linked_Size": size, "X_Repo_Commit": commit}
        raise Answer(302, **linked, Location=f"{self.hub.storage}/objects/{found.oid}")

    def _object(self, method: str, oid: str, body: bytes) -> None:
        hub = self.hub
        assert "Authorization" not in self.headers
        if method == "PUT":
            with hub.lock:
                hold = hub.hold_after is not None and len(hub.objects) >= hub.hold_after
            if hold:
                hub.held.set()
                hub.released.wait(60)
                raise Answer(0)
            with hub.lock:
                if hashlib.sha256(body).hexdigest() != oid:
                    raise Answer(400, {"error": "not the object of this name"})
                hub.objects[oid] = body
            raise Answer(200)
        content = hub.objects[oid]
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in self.headers else 0
        length = len(content) - start
        headers = {"ETag": f'"{oid}"', "Accept_Ranges": "bytes", "Content_Length": str(length)}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        sent = content[start : start + hub.cut.pop(oid)] if oid in hub.cut else content[start:]
        raise Answer(206 if start else 200, sent, **headers)
