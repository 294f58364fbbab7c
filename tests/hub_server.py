"""A small Hub on loopback: keeps repositories and enforces the protocol that huggingface_hub 2.4.0 speaks.

It serves models over HTTP with the LFS path (``HF_HUB_DISABLE_XET=1``): accounts and tokens, repositories with
branches, commits and pull requests, LFS objects on a second origin behind signed links, server-side copies
between repositories, and the read side that ``snapshot_download`` and ``from_pretrained`` use. It refuses what
the Hub refuses: bad tokens, missing rights, wrong hashes, objects that were never uploaded, a parent commit that
is no longer the head, invalid card metadata. Faults can be ordered, and every request is logged with its bytes.

What it cannot show: the chunk store (Xet), the Hub's own limits and scans, and whatever the Hub changes later.

    python -m tests.hub_server --account alice:hf_write --repo alice/model=FOLDER
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import hashlib
import hmac
import json
import re
import secrets
import shutil
import signal
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
import yaml

GIT_ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf", "*.parquet", "*.zip")
).encode()
REGULAR_FILE_LIMIT = 10 * 2**20
DATE = "2026-01-01T00:00:00.000Z"
YAML_BLOCK = re.compile(r"^\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
COMMIT_OID = re.compile(r"[0-9a-f]{40}")

Role = Literal["read", "write", "fineGrained"]


class Refusal(Exception):
    """An answer other than success, in the Hub's words."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass(frozen=True)
class Account:
    """A user with one token; one of the role ``fineGrained`` writes to the namespaces of ``scope`` alone."""

    name: str
    token: str
    role: Role
    organizations: tuple[str, ...] = ()
    scope: tuple[str, ...] = ()

    def may_write(self, namespace: str) -> bool:
        """Whether the token's rights reach that far."""
        return self.role == "write" or (self.role == "fineGrained" and namespace in self.scope)


@dataclass(frozen=True)
class Blob:
    """One version of one file.

    Attributes:
        sha256: of the content, also where the object store keeps it.
        oid: git's SHA-1 of the content, or of the LFS pointer.
    """

    sha256: str
    size: int
    oid: str
    is_lfs: bool


@dataclass(frozen=True)
class Commit:
    """A snapshot of a repository: path to file, and where it came from."""

    oid: str
    parent: str | None
    title: str
    author: str
    files: Mapping[str, Blob]


@dataclass(frozen=True)
class PullRequest:
    """An open pull request; its commits are on ``refs/pr/N``."""

    number: int
    title: str
    author: str


@dataclass
class Repository:
    """A model repository.

    Attributes:
        refs: ``main``, other branches and ``refs/pr/N`` to the commit they point to.
        objects: SHA-256 of the LFS objects that commits here may name.
        gated: only ``readers`` and the owner may read file contents.
        xet: files have a xet hash, without which the Hub copies nothing between repositories.
        region: the Hub copies only within one storage region.
    """

    name: str
    private: bool = False
    gated: bool = False
    readers: frozenset[str] = frozenset()
    xet: bool = True
    region: str = "us"
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    objects: set[str] = field(default_factory=set)
    pull_requests: list[PullRequest] = field(default_factory=list)


@dataclass
class Fault:
    """What goes wrong with the next requests that match.

    Attributes:
        method, path: HTTP method, and a regular expression searched in the path; storage requests have paths
            ``/upload/…`` and ``/object/…``.
        kind: ``status`` answers ``status`` with ``message``; ``drop`` cuts the connection after ``after_bytes`` of
            an upload's body, or of a download's; ``lose`` does what was asked and cuts the connection in place of
            an answer; ``slow`` waits ``seconds`` and then answers as usual.
        times: how many requests are hit.
    """

    method: str
    path: str
    kind: Literal["status", "drop", "lose", "slow"]
    status: int = 500
    message: str = "Internal Error - We're working hard to fix this as soon as possible!"
    code: str = ""
    after_bytes: int = 0
    seconds: float = 0.0
    times: int = 1


@dataclass
class LoggedRequest:
    """One request, in the log from its start; ``received`` and ``sent`` count bytes of the bodies.

    ``status`` is 0 until an answer begins, and stays so where the connection broke before one.
    """

    method: str
    path: str
    authorized: bool
    status: int = 0
    received: int = 0
    sent: int = 0


class HubServer:
    """Two HTTP servers on 127.0.0.1, the Hub and its object storage, and all that they keep.

    Args:
        folder: where objects are stored; contents are kept as long as the folder is.
        port: of the Hub; 0 takes a free one. The storage always takes a free one.
        page_size: entries in one page of a tree listing.
    """

    def __init__(self, folder: Path, port: int = 0, page_size: int = 1000) -> None:
        self.folder = folder
        self.page_size = page_size
        self.accounts: dict[str, Account] = {}
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.log: list[LoggedRequest] = []
        self.lock = threading.RLock()
        self._secret = secrets.token_bytes(16)
        folder.mkdir(parents=True, exist_ok=True)
        self._servers = [
            ThreadingHTTPServer(("127.0.0.1", port), type("Hub", (HubHandler,), {"hub": self})),
            ThreadingHTTPServer(("127.0.0.1", 0), type("Storage", (StorageHandler,), {"hub": self})),
        ]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def start(self) -> None:
        """Answer requests on background threads until :meth:`stop`."""
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Close both ports."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables that lead a client in a fresh process here, with caches under ``home``."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            **({"HF_TOKEN": token} if token else {}),
        }

    def add_account(
        self,
        name: str,
        role: Role = "write",
        organizations: tuple[str, ...] = (),
        scope: tuple[str, ...] = (),
    ) -> str:
        """Register a user and return the token."""
        account = Account(name, f"hf_{secrets.token_hex(8)}", role, organizations, scope)
        self.accounts[account.token] = account
        return account.token

    def add_repo(self, name: str, files: Mapping[str, bytes] | Path | None = None, **settings: Any) -> str:
        """Create a repository as its owner would, and return the commit of ``main``.

        Args:
            files: path in the repository to content, or a folder to take all files from.
            settings: attributes of :class:`Repository`.
        """
        with self.lock:
            repo = self.repositories[name] = Repository(name, **settings)
            self.commit(repo, "main", {".gitattributes": GIT_ATTRIBUTES}, "initial commit", name.split("/")[0])
            if files is None:
                return repo.refs["main"]
            return self.commit(repo, "main", _contents(files), "Add files", name.split("/")[0])

    def commit(self, repo: Repository, ref: str, files: Mapping[str, bytes], title: str, author: str) -> str:
        """Add contents to ``ref`` without going through HTTP, and return the commit."""
        blobs = {}
        for path, content in files.items():
            is_lfs = self.wants_lfs(repo, path, content[:512], len(content))
            blobs[path] = self.store(content, is_lfs)
            if is_lfs:
                repo.objects.add(blobs[path].sha256)
        return self.add_commit(repo, ref, blobs, (), title, author).oid

    def content(self, name: str, path: str, revision: str = "main") -> bytes:
        """What a repository holds at ``path``."""
        repo = self.repositories[name]
        return self.object_path(repo.commits[repo.refs.get(revision, revision)].files[path].sha256).read_bytes()

    def paths(self, name: str, revision: str = "main") -> list[str]:
        """The paths of a repository, sorted."""
        repo = self.repositories[name]
        return sorted(repo.commits[repo.refs.get(revision, revision)].files)

    def history(self, name: str, revision: str = "main") -> list[Commit]:
        """The commits of a ref, newest first."""
        repo = self.repositories[name]
        commits = []
        oid: str | None = repo.refs.get(revision, revision)
        while oid is not None:
            commits.append(repo.commits[oid])
            oid = repo.commits[oid].parent
        return commits

    def uploaded_bytes(self) -> int:
        """Bytes of file content that reached the storage or came inside a commit, since the log was cleared."""
        return sum(r.received for r in self.log if r.path.startswith("/upload/") or "/commit/" in r.path)

    def object_path(self, sha256: str) -> Path:
        """Where the object store keeps a content."""
        return self.folder / sha256

    def store(self, content: bytes, is_lfs: bool) -> Blob:
        """Keep a content and describe it."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.object_path(sha256).write_bytes(content)
        return Blob(sha256, len(content), lfs_oid(sha256, len(content)) if is_lfs else git_oid(content), is_lfs)

    def wants_lfs(self, repo: Repository, path: str, sample: bytes, size: int) -> bool:
        """Whether the Hub takes this file as an LFS object: by .gitattributes, size, or binary content."""
        rules = GIT_ATTRIBUTES.decode()
        if "main" in repo.refs:
            attributes = repo.commits[repo.refs["main"]].files.get(".gitattributes")
            rules = self.object_path(attributes.sha256).read_text() if attributes else ""
        patterns = [line.split()[0] for line in rules.splitlines() if "filter=lfs" in line]
        if any(fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(Path(path).name, pattern) for pattern in patterns):
            return size > 0
        return size > REGULAR_FILE_LIMIT or b"\0" in sample

    def add_commit(
        self,
        repo: Repository,
        ref: str,
        added: Mapping[str, Blob],
        removed: tuple[str, ...],
        title: str,
        author: str,
    ) -> Commit:
        """Put a commit on top of ``ref``, which is created where it is missing."""
        parent = repo.refs.get(ref)
        files = {**(repo.commits[parent].files if parent else {}), **added}
        for path in removed:
            del files[path]
        tree = json.dumps({path: files[path].oid for path in sorted(files)})
        oid = hashlib.sha1(f"{repo.name}\n{parent}\n{title}\n{len(repo.commits)}\n{tree}".encode()).hexdigest()
        repo.commits[oid] = commit = Commit(oid, parent, title, author, files)
        repo.refs[ref] = oid
        return commit

    def sign(self, text: str) -> str:
        """The signature that a storage link carries."""
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault ordered for this request, if any, counted down."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


def git_oid(content: bytes) -> str:
    """Git's name of a file content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_oid(sha256: str, size: int) -> str:
    """Git's name of the pointer file that stands for an LFS object."""
    return git_oid(f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode())


def xet_hash(sha256: str) -> str:
    """Something of a xet hash's form, fixed by the content."""
    return hashlib.sha256(f"xet {sha256}".encode()).hexdigest()


def _contents(files: Mapping[str, bytes] | Path) -> Mapping[str, bytes]:
    if not isinstance(files, Path):
        return files
    return {p.relative_to(files).as_posix(): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}


class Handler(BaseHTTPRequestHandler):
    """One connection: finds the route, applies faults, checks, answers, logs."""

    hub: ClassVar[HubServer]
    routes: ClassVar[tuple[tuple[str, str, str], ...]]
    protocol_version = "HTTP/1.1"
    # Headers and body leave in two writes; together with delayed acknowledgements that would cost 40 ms each time.
    disable_nagle_algorithm = True

    def handle_any(self) -> None:
        """Answer one request of any method."""
        path = urlsplit(self.path).path
        self.entry = LoggedRequest(self.command, path, "authorization" in self.headers)
        self.hub.log.append(self.entry)
        self.query = {key: values[-1] for key, values in parse_qs(urlsplit(self.path).query).items()}
        fault = self.hub.take_fault(self.command, path)
        self.drop_after = fault.after_bytes if fault and fault.kind == "drop" else None
        self.lose_answer = fault is not None and fault.kind == "lose"
        try:
            if fault and fault.kind == "slow":
                # Not time.sleep, which tests of the client's retries do away with.
                threading.Event().wait(fault.seconds)
            if fault and fault.kind == "status":
                self.read_body()
                raise Refusal(fault.status, fault.message, fault.code)
            self.find_route(path)()
        except Refusal as refusal:
            with suppress(ConnectionError):
                self.answer_json({"error": refusal.message}, refusal.status, refusal.headers)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def find_route(self, path: str) -> Callable[[], None]:
        for method, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                groups = [None if group is None else unquote(group) for group in match.groups()]
                return lambda: getattr(self, name)(*groups)
        self.read_body()
        raise Refusal(404, "Not Found")

    def body_blocks(self) -> Iterator[bytes]:
        """The request's body, plain or chunked, block by block; cut off where a fault says so."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.count(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            block = self.count(self.rfile.read(min(left, 2**16)))
            if not block:
                raise ConnectionResetError
            left -= len(block)
            yield block

    def count(self, block: bytes) -> bytes:
        self.entry.received += len(block)
        if self.drop_after is not None and self.entry.received > self.drop_after:
            self.drop_connection()
        return block

    def drop_connection(self) -> None:
        """Reset the connection as a broken line would."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise ConnectionResetError

    def read_body(self) -> bytes:
        return b"".join(self.body_blocks())

    def read_json(self) -> Any:
        return json.loads(self.read_body() or b"{}")

    def answer_json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def answer(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        if self.lose_answer:
            self.drop_connection()
        self.entry.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.send_block(body)

    def send_block(self, block: bytes) -> None:
        if self.drop_after is not None and self.entry.sent + len(block) > self.drop_after:
            self.wfile.write(block[: self.drop_after - self.entry.sent])
            self.wfile.flush()
            self.entry.sent = self.drop_after
            self.connection.shutdown(socket.SHUT_WR)
            self.close_connection = True
            raise ConnectionResetError
        self.entry.sent += len(block)
        self.wfile.write(block)

    def answer_file(self, path: Path, headers: Mapping[str, str]) -> None:
        """A file, or the one byte range that was asked for."""
        size = path.stat().st_size
        start, end, status = 0, size - 1, 200
        headers = {"Accept-Ranges": "bytes", **headers}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = asked.groups()
            start = int(first) if first else max(0, size - int(last))
            end = min(size - 1, int(last)) if first and last else size - 1
            if start > end:
                raise Refusal(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{size}"})
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        self.entry.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(end - start + 1), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with path.open("rb") as file:
            file.seek(start)
            left = end - start + 1
            while left:
                block = file.read(min(left, 2**16))
                self.send_block(block)
                left -= len(block)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the requests are in ``HubServer.log``."""


class StorageHandler(Handler):
    """The object storage: signed links alone open it, and an Authorization header is refused, as S3 does."""

    routes = (
        ("PUT", r"/upload/([^/]+/[^/]+)/([0-9a-f]{64})", "put_object"),
        ("GET|HEAD", r"/object/([0-9a-f]{64})", "get_object"),
    )

    def check_signature(self, text: str) -> None:
        if "authorization" in self.headers:
            raise Refusal(400, "Only one auth mechanism allowed")
        if not hmac.compare_digest(self.hub.sign(text), self.query.get("signature", "")):
            raise Refusal(403, "Access Denied")

    def put_object(self, repo: str, sha256: str) -> None:
        self.check_signature(f"{repo} {sha256}")
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.hub.folder, delete=False) as file:
            try:
                for block in self.body_blocks():
                    digest.update(block)
                    file.write(block)
            except ConnectionResetError:
                Path(file.name).unlink()
                raise
        if digest.hexdigest() != sha256:
            Path(file.name).unlink()
            raise Refusal(400, "The SHA256 you specified did not match the calculated checksum")
        Path(file.name).replace(self.hub.object_path(sha256))
        self.answer(b"", headers={"ETag": f'"{sha256}"'})

    def get_object(self, sha256: str) -> None:
        self.check_signature(sha256)
        self.answer_file(self.hub.object_path(sha256), {"ETag": f'"{sha256}"'})


class HubHandler(Handler):
    """The Hub's own endpoints."""

    routes = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("GET", r"/api/models/([^/]+/[^/]+)/auth-check(/write)?", "auth_check"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "model_info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", "list_tree"),
        ("POST", r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", "paths_info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/refs", "list_refs"),
        ("GET", r"/api/models/([^/]+/[^/]+)/commits/([^/]+)", "list_commits"),
        ("GET", r"/api/models/([^/]+/[^/]+)/discussions", "list_discussions"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "create_branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/lfs-files/duplicate", "duplicate_objects"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "create_commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/verify", "lfs_verify"),
        ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("POST", r"/_test/faults", "order_fault"),
        ("GET", r"/_test/log", "show_log"),
    )

    # Who asks, and what they may do

    def account(self) -> Account | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        account = self.hub.accounts.get(header.removeprefix("Bearer "))
        if account is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return account

    def owns(self, account: Account | None, namespace: str) -> bool:
        return account is not None and (namespace == account.name or namespace in account.organizations)

    def readable(self, name: str) -> Repository:
        account = self.account()
        repo = self.hub.repositories.get(name)
        if repo is None or (repo.private and not self.owns(account, name.split("/")[0])):
            if account is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def open_for_contents(self, name: str) -> Repository:
        repo = self.readable(name)
        account = self.account()
        if repo.gated and not self.owns(account, name.split("/")[0]):
            words = f"Access to model {name} is restricted"
            if account is None:
                raise Refusal(401, f"{words}. You must have access to it and be authenticated.", "GatedRepo")
            if account.name not in repo.readers:
                raise Refusal(403, f"{words} and you are not in the authorized list. Ask for access.", "GatedRepo")
        return repo

    def writable(self, name: str, as_pull_request: bool = False) -> Repository:
        repo = self.readable(name)
        account = self.account()
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        if account.role == "read":
            raise Refusal(403, "You are using a read token, which cannot write. Use a token with write access")
        if not as_pull_request and not account.may_write(name.split("/")[0]):
            raise Refusal(403, f"Your token's permissions do not cover {name}")
        if not as_pull_request and not self.owns(account, name.split("/")[0]):
            raise Refusal(403, f"You don't have the required permissions to write to {name}")
        return repo

    def commit_at(self, repo: Repository, revision: str) -> Commit:
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.commits[oid]

    # Accounts and repositories

    def whoami(self) -> None:
        account = self.account()
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        organizations = [{"type": "org", "name": name, "roleInOrg": "write"} for name in account.organizations]
        token: dict[str, Any] = {"displayName": "test", "role": account.role, "createdAt": DATE}
        if account.role == "fineGrained":
            scoped = [{"entity": {"name": name}, "permissions": ["repo.write"]} for name in account.scope]
            token["fineGrained"] = {"global": [], "scoped": scoped}
        auth = {"type": "access_token", "accessToken": token}
        self.answer_json({"type": "user", "name": account.name, "orgs": organizations, "auth": auth})

    def validate_yaml(self) -> None:
        problems = metadata_problems(self.read_json()["content"])
        if problems:
            if self.headers.get("Accept") == "text/plain":
                self.answer("\n".join(problems).encode(), 400, {"Content-Type": "text/plain"})
                return
            message = {"errors": [{"message": problem} for problem in problems], "warnings": []}
            self.answer_json(message, 400, {"X-Error-Message": problems[0]})
        else:
            self.answer_json({"errors": [], "warnings": []})

    def create_repo(self) -> None:
        asked = self.read_json()
        account = self.account()
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        namespace = asked.get("organization") or account.name
        name = f"{namespace}/{asked['name']}"
        if not account.may_write(namespace) or not self.owns(account, namespace):
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        with self.hub.lock:
            if name in self.hub.repositories:
                url = f"{self.hub.url}/{name}"
                self.answer_json({"error": "You already created this model repo", "url": url}, 409)
                return
            self.hub.add_repo(name, private=asked.get("visibility") == "private")
        self.answer_json({"url": f"{self.hub.url}/{name}", "name": name})

    def auth_check(self, name: str, write: str | None) -> None:
        if write:
            self.writable(name)
        else:
            self.open_for_contents(name)
        self.answer_json({})

    # Reading

    def model_info(self, name: str, revision: str | None) -> None:
        repo = self.readable(name)
        commit = self.commit_at(repo, revision or "main")
        siblings: list[dict[str, Any]] = []
        for path, blob in sorted(commit.files.items()):
            siblings.append({"rfilename": path})
            if self.query.get("blobs"):
                siblings[-1] |= {"size": blob.size, "blobId": blob.oid}
                if blob.is_lfs:
                    siblings[-1]["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 134}
        card = commit.files.get("README.md")
        metadata = card_metadata(self.hub.object_path(card.sha256).read_text()) if card else {}
        self.answer_json(
            {
                "_id": hashlib.sha1(name.encode()).hexdigest()[:24],
                "id": name,
                "author": name.split("/")[0],
                "sha": commit.oid,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "lastModified": DATE,
                "createdAt": DATE,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": metadata.get("tags", []),
                "library_name": metadata.get("library_name"),
                "pipeline_tag": metadata.get("pipeline_tag"),
                "cardData": metadata,
                "siblings": siblings,
            }
        )

    def describe(self, repo: Repository, path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
        if blob.is_lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
            if repo.xet:
                entry["xetHash"] = xet_hash(blob.sha256)
        return entry

    def list_tree(self, name: str, revision: str, folder: str | None) -> None:
        repo = self.readable(name)
        commit = self.commit_at(repo, revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: blob for path, blob in sorted(commit.files.items()) if path.startswith(prefix)}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        folders = {
            str(parent) for path in inside for parent in Path(path).parents if str(parent) not in (".", folder)
        }
        folders = {path for path in folders if path.startswith(prefix)}
        entries = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        entries += [self.describe(repo, path, blob) for path, blob in inside.items()]
        if self.query.get("recursive") not in ("true", "True", "1"):
            entries = [entry for entry in entries if "/" not in str(entry["path"]).removeprefix(prefix)]
        start = int(self.query.get("cursor", 0))
        end = start + self.hub.page_size
        query = urlencode({**self.query, "cursor": end})
        url = f"{self.hub.url}{urlsplit(self.path).path}?{query}"
        more = {"Link": f'<{url}>; rel="next"'} if end < len(entries) else {}
        self.answer_json(entries[start:end], headers=more)

    def paths_info(self, name: str, revision: str) -> None:
        asked = parse_qs(self.read_body().decode()).get("paths", [])
        repo = self.readable(name)
        files = self.commit_at(repo, revision).files
        self.answer_json([self.describe(repo, path, files[path]) for path in asked if path in files])

    def list_refs(self, name: str) -> None:
        repo = self.readable(name)
        refs = [{"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": oid} for ref, oid in repo.refs.items()]
        branches = [ref for ref in refs if not ref["name"].startswith("refs/pr/")]
        pulls = [{**ref, "ref": ref["name"]} for ref in refs if ref["name"].startswith("refs/pr/")]
        self.answer_json({"branches": branches, "converts": [], "tags": [], "pullRequests": pulls})

    def list_commits(self, name: str, revision: str) -> None:
        repo = self.readable(name)
        self.commit_at(repo, revision)
        self.answer_json(
            [
                {"id": c.oid, "title": c.title, "message": "", "date": DATE, "authors": [{"user": c.author}]}
                for c in self.hub.history(name, revision)
            ]
        )

    def list_discussions(self, name: str) -> None:
        repo = self.readable(name)
        found = [
            {
                "title": pull.title,
                "num": pull.number,
                "author": {"name": pull.author},
                "createdAt": DATE,
                "status": "open",
                "repo": {"name": name, "type": "model"},
                "isPullRequest": True,
            }
            for pull in repo.pull_requests
            if self.query.get("author") in (None, pull.author)
        ]
        self.answer_json({"discussions": found, "count": len(found), "start": 0})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.open_for_contents(name)
        commit = self.commit_at(repo, revision)
        blob = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid}
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        if not blob.is_lfs:
            self.answer_file(self.hub.object_path(blob.sha256), {**headers, "ETag": f'"{blob.oid}"'})
            return
        headers |= {
            "Location": f"{self.hub.storage_url}/object/{blob.sha256}?signature={self.hub.sign(blob.sha256)}",
            "X-Linked-Etag": f'"{blob.sha256}"',
            "X-Linked-Size": str(blob.size),
        }
        self.answer(b"", 302, headers)

    # Writing

    def create_branch(self, name: str, branch: str) -> None:
        asked = self.read_json()
        repo = self.writable(name)
        with self.hub.lock:
            if branch in repo.refs:
                raise Refusal(409, f"Reference already exists: {branch}")
            repo.refs[branch] = self.commit_at(repo, asked.get("startingPoint", "main")).oid
        self.answer_json({})

    def preupload(self, name: str, revision: str) -> None:
        asked = self.read_json()
        repo = self.writable(name, as_pull_request="create_pr" in self.query)
        present = self.commit_at(repo, revision).files
        answers = []
        for file in asked["files"]:
            is_lfs = self.hub.wants_lfs(repo, file["path"], base64.b64decode(file["sample"]), file["size"])
            answers.append(
                {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            )
            if blob := present.get(file["path"]):
                answers[-1]["oid"] = blob.sha256 if blob.is_lfs else blob.oid
        self.answer_json({"files": answers})

    def lfs_batch(self, name: str) -> None:
        asked = self.read_json()
        # Someone who opens a pull request names no branch here, and needs no right to write to one.
        repo = self.writable(name, as_pull_request="ref" not in asked)
        objects = []
        for item in asked["objects"]:
            objects.append({"oid": item["oid"], "size": item["size"], "authenticated": True})
            if item["oid"] not in repo.objects:
                href = f"{self.hub.storage_url}/upload/{name}/{item['oid']}"
                signature = self.hub.sign(f"{name} {item['oid']}")
                objects[-1]["actions"] = {
                    "upload": {"href": f"{href}?signature={signature}", "header": {}},
                    "verify": {"href": f"{self.hub.url}/{name}.git/info/lfs/verify", "header": {}},
                }
        self.answer_json({"transfer": "basic", "objects": objects})

    def lfs_verify(self, name: str) -> None:
        asked = self.read_json()
        repo = self.writable(name, as_pull_request=True)
        path = self.hub.object_path(asked["oid"])
        if not path.is_file() or path.stat().st_size != asked["size"]:
            raise Refusal(404, "Object not found or of another size")
        repo.objects.add(asked["oid"])
        self.answer_json({})

    def duplicate_objects(self, name: str) -> None:
        asked = self.read_json()
        source = self.open_for_contents(name)
        target = self.writable(asked["target"]["name"], as_pull_request=True)
        done, failed = [], []
        for file in asked["files"]:
            if source.region != target.region:
                failed.append({"sha256": file["sha256"], "error": "Repositories are in different storage regions"})
            elif file["sha256"] not in source.objects or file["xetHash"] != xet_hash(file["sha256"]):
                failed.append({"sha256": file["sha256"], "error": "File not found in source repository"})
            else:
                target.objects.add(file["sha256"])
                done.append({"sha256": file["sha256"]})
        self.answer_json({"success": done, "failed": failed})

    def create_commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.read_body().splitlines() if line.strip()]
        create_pr = self.query.get("create_pr") == "1"
        repo = self.writable(name, as_pull_request=create_pr or revision.startswith("refs/pr/"))
        account = self.account()
        assert account is not None
        with self.hub.lock:
            head = self.commit_at(repo, revision)
            header = lines[0]["value"]
            parent = header.get("parentCommit", head.oid)
            if parent != head.oid and not create_pr:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            start = self.commit_at(repo, parent)
            added: dict[str, Blob] = {}
            removed: list[str] = []
            for line in lines[1:]:
                self.stage(repo, start, line["key"], line["value"], added, removed)
            number = len(repo.pull_requests) + 1
            if create_pr:
                revision = f"refs/pr/{number}"
                repo.refs[revision] = parent
                repo.pull_requests.append(PullRequest(number, header["summary"], account.name))
            commit = self.hub.add_commit(repo, revision, added, tuple(removed), header["summary"], account.name)
        url = f"{self.hub.url}/{name}"
        self.answer_json(
            {
                "success": True,
                "commitOid": commit.oid,
                "commitUrl": f"{url}/commit/{quote(commit.oid)}",
                "pullRequestUrl": f"{url}/discussions/{number}" if create_pr else None,
            }
        )

    def stage(
        self,
        repo: Repository,
        start: Commit,
        key: str,
        value: Mapping[str, Any],
        added: dict[str, Blob],
        removed: list[str],
    ) -> None:
        """Take one line of a commit, or refuse the commit."""
        path = value["path"]
        if key == "deletedFile":
            if path not in start.files:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            removed.append(path)
        elif key == "lfsFile":
            if value["oid"] not in repo.objects:
                raise Refusal(400, f'LFS pointer pointed to a file that does not exist: "{path}"')
            size = self.hub.object_path(value["oid"]).stat().st_size
            if value.get("size", size) != size:
                raise Refusal(400, f'LFS pointer has a wrong size: "{path}"')
            added[path] = Blob(value["oid"], size, lfs_oid(value["oid"], size), True)
        elif key == "file" and value["encoding"] == "base64":
            content = base64.b64decode(value["content"], validate=True)
            if self.hub.wants_lfs(repo, path, content[:512], len(content)):
                raise Refusal(400, f'Your push was rejected: "{path}" has to be an LFS file')
            if path == "README.md" and (problems := metadata_problems(content.decode())):
                raise Refusal(400, f"Invalid metadata in README.md: {problems[0]}")
            added[path] = self.hub.store(content, is_lfs=False)
        else:
            raise Refusal(400, f"Unknown operation {key}")

    # For a test in another process

    def order_fault(self) -> None:
        self.hub.faults.append(Fault(**self.read_json()))
        self.answer_json({})

    def show_log(self) -> None:
        self.answer_json([asdict(entry) for entry in list(self.hub.log)])


def card_metadata(card: str) -> dict[str, Any]:
    """The front matter of a card; empty where there is none or it is no mapping."""
    block = YAML_BLOCK.search(card)
    data = yaml.safe_load(block.group(1)) if block else None
    return data if isinstance(data, dict) else {}


def metadata_problems(card: str) -> list[str]:
    """What the Hub would refuse about a card's front matter; empty when nothing."""
    block = YAML_BLOCK.search(card)
    if not block:
        return []
    try:
        data = yaml.safe_load(block.group(1))
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(data, dict):
        return ["YAML metadata must be a mapping"]
    problems = []
    for key in ("tags", "datasets"):
        value = data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            problems.append(f'"{key}" must be an array of strings')
    for key in ("license", "license_name", "library_name", "pipeline_tag", "base_model_relation"):
        if key in data and not isinstance(data[key], str):
            problems.append(f'"{key}" must be a string')
    models = data.get("base_model", [])
    for model in models if isinstance(models, list) else [models]:
        if not isinstance(model, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
            problems.append(f'"base_model" with value "{model}" is not valid. Use a model id')
    if data.get("license") == "other" and not data.get("license_name"):
        problems.append('"license_name" is required when "license" is "other"')
    for entry in data.get("model-index", []):
        for result in entry.get("results", []) if isinstance(entry, dict) and "name" in entry else [{}]:
            for key in ("task", "dataset", "metrics"):
                if key not in result:
                    problems.append(f'"model-index[0].results[0].{key}" is required')
            for metric in result.get("metrics", []):
                if "type" not in metric or "value" not in metric:
                    problems.append('"model-index[0].results[0].metrics[0].value" is required')
    return problems


@contextmanager
def running_hub(folder: Path, port: int = 0, page_size: int = 1000) -> Iterator[HubServer]:
    """A server that answers for as long as the block runs."""
    server = HubServer(folder, port, page_size)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def point_client_at(server: HubServer, monkeypatch: pytest.MonkeyPatch, home: Path, token: str | None) -> None:
    """Lead the client of this process to the server; it reads its environment at import, hence more than that."""
    for variable in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in server.environment(home, token).items():
        monkeypatch.setenv(variable, value)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    # File systems are kept for reuse and remember which server they were made for.
    huggingface_hub.HfFileSystem.clear_instance_cache()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on loopback that the client of this process talks to, logged in as ``alice`` with a write token."""
    with running_hub(tmp_path / "hub-objects") as server:
        point_client_at(server, monkeypatch, tmp_path / "hub-home", server.add_account("alice"))
        yield server


def main() -> None:
    """Serve until Ctrl-C, and print the variables that lead a client here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--account", action="append", default=[], metavar="NAME:TOKEN[:ROLE]")
    parser.add_argument("--repo", action="append", default=[], metavar="OWNER/NAME=FOLDER")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="hub-"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with running_hub(folder / "objects", options.port) as server:
            for text in options.account:
                name, token, *role = text.split(":")
                server.accounts[token] = Account(name, token, "read" if role == ["read"] else "write")
            for text in options.repo:
                name, path = text.split("=", 1)
                server.add_repo(name, Path(path))
            for variable, value in server.environment(folder / "home").items():
                print(f"export {variable}={value}", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
