"""What the loopback Hub keeps: accounts, repositories with their commits, and the contents of files."""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import json
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

GIT_ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf", "*.parquet", "*.zip")
).encode()
REGULAR_FILE_LIMIT = 10 * 2**20

Role = Literal["read", "write", "fineGrained"]


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
        gated: only the owner may read file contents.
    """

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    objects: set[str] = field(default_factory=set)
    pull_requests: list[PullRequest] = field(default_factory=list)


class Storage:
    """Accounts and repositories, without the protocol.

    Args:
        folder: where contents are kept, as long as the folder is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.accounts: dict[str, Account] = {}
        self.repositories: dict[str, Repository] = {}
        self.lock = threading.RLock()
        self._secret = secrets.token_bytes(16)
        folder.mkdir(parents=True, exist_ok=True)

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


def git_oid(content: bytes) -> str:
    """Git's name of a file content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_oid(sha256: str, size: int) -> str:
    """Git's name of the pointer file that stands for an LFS object."""
    return git_oid(f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode())


def _contents(files: Mapping[str, bytes] | Path) -> Mapping[str, bytes]:
    if not isinstance(files, Path):
        return files
    return {p.relative_to(files).as_posix(): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
