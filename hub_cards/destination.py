"""Where a converted model is to go, what stands there, and whether it may be written."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from converter.errors import LayoutError, PublishError, UsageError
from converter.manifest import MANIFEST_NAME, Manifest, SourceRecord
from converter.output import converted_name


@dataclass(frozen=True)
class Destination:
    """Where the user wants a converted model to go.

    Attributes:
        repo_id: ``owner/name``, ``name`` for one's own, or None for the default name.
        private: the repository is created private.
        revision: branch, or an open pull request's ``refs/pr/N``; None for ``main``.
        create_pr: open a pull request.
        commit_message: None for a message that names the source.
        yes_overwrite: push over a repository that holds something else.
    """

    repo_id: str | None = None
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    yes_overwrite: bool = False

    def push_line(self, folder: Path, repo_id: str | None = None) -> str:
        """The command that pushes ``folder`` there."""
        words = ["mmod", "push", str(folder)]
        for option, value in (
            ("--repo-id", repo_id or self.repo_id),
            ("--revision", self.revision),
            ("--commit-message", self.commit_message),
        ):
            words += [option, value] if value else []
        for option, chosen in (
            ("--private", self.private),
            ("--create-pr", self.create_pr),
            ("--yes-overwrite", self.yes_overwrite),
        ):
            words += [option] if chosen else []
        return shlex.join(words)


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub as it stands.

    Attributes:
        has_branch: whether the branch asked for is there; otherwise ``head`` and ``files`` are those of main.
        head: commit of the branch; None where the repository does not exist.
        files: path to what the Hub knows of the file.
    """

    exists: bool
    private: bool = False
    has_branch: bool = False
    head: str | None = None
    files: Mapping[str, RepoFile] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A repository that may be written; ``is_ours`` says that it holds a conversion of the same source."""

    repo_id: str
    repository: Repository
    is_ours: bool


def open_target(api: HfApi, destination: Destination, source: SourceRecord, target_len: int | None) -> Target:
    """Look at the repository and make sure that this user may push a conversion of ``source`` to it.

    Args:
        target_len: tokens, for the default name.

    Raises:
        UsageError: options that exclude each other.
        PublishError: no right to write, or the repository holds something else.
        HfHubHTTPError and others of the client: the Hub refused a request.
    """
    if destination.create_pr and destination.revision not in (None, "main"):
        raise UsageError(
            "--create-pr opens a pull request against main, so it excludes --revision.",
            "To go on in an open pull request, use --revision refs/pr/N alone.",
        )
    repo_id = destination.repo_id or converted_name(source.name, target_len)
    if "/" not in repo_id:
        repo_id = f"{api.whoami(cache=True)['name']}/{repo_id}"
    repository = look_at(api, repo_id, destination.revision)
    _check_access(api, repo_id, repository, destination)
    return Target(repo_id, repository, _check_contents(api, repo_id, repository, destination, source))


def look_at(api: HfApi, repo_id: str, revision: str | None) -> Repository:
    """What stands in a repository, at a branch or pull request."""
    try:
        info, has_branch = api.model_info(repo_id, revision=revision), True
    except RevisionNotFoundError:
        info, has_branch = api.model_info(repo_id), False
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return Repository(exists=False)
    entries = api.list_repo_tree(repo_id, recursive=True, revision=info.sha)
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    return Repository(True, bool(info.private), has_branch, info.sha, files)


def _check_access(api: HfApi, repo_id: str, repository: Repository, destination: Destination) -> None:
    """Whether this user may write there, or create the repository."""
    if repository.exists:
        # Anyone who can read may open a pull request.
        api.auth_check(repo_id, write=not destination.create_pr)
        if destination.private and not repository.private:
            raise PublishError(
                f"{repo_id} is public, and --private was given.",
                "Make it private in its settings on the Hub, choose another --repo-id, or leave --private out.",
            )
        return
    if destination.create_pr:
        raise PublishError(f"{repo_id} does not exist, so there is nothing to open a pull request against.")
    namespace = repo_id.split("/")[0]
    account = api.whoami(cache=True)
    roles = {org["name"]: org.get("roleInOrg") for org in account.get("orgs", [])} | {account["name"]: "admin"}
    token = account.get("auth", {}).get("accessToken") or {}
    reason = ""
    if namespace not in roles:
        reason = f"you are {account['name']} and no member of {namespace}"
    elif roles[namespace] == "read":
        reason = f"your role in {namespace} is read"
    elif token.get("role") == "read" or (token.get("role") == "fineGrained" and not _may_write(token, namespace)):
        reason = f"your token ({token.get('displayName', 'unnamed')}) has no right to write for {namespace}"
    if reason:
        raise PublishError(
            f"{repo_id} cannot be created: {reason}.",
            "Use a token with write access (hf auth login), or choose another --repo-id.",
        )


def _may_write(token: Mapping[str, Any], namespace: str) -> bool:
    """Whether a fine-grained token may create and write repositories of ``namespace``."""
    scopes = token.get("fineGrained", {}).get("scoped", [])
    return any(
        "repo.write" in scope.get("permissions", []) and scope.get("entity", {}).get("name") == namespace
        for scope in scopes
    )


def _check_contents(
    api: HfApi, repo_id: str, repository: Repository, destination: Destination, source: SourceRecord
) -> bool:
    """Whether the repository holds a conversion of the same source; refuse one that holds anything else.

    Raises:
        PublishError: it is neither empty nor ours, and ``yes_overwrite`` was not given.
    """
    held = [path for path in repository.files if path != ".gitattributes"]
    found = "no manifest of this tool"
    if MANIFEST_NAME in held:
        path = api.hf_hub_download(repo_id, MANIFEST_NAME, revision=repository.head)
        try:
            there = Manifest.from_json(Path(path).read_bytes()).source
        except LayoutError as error:
            found = error.message
        else:
            # A folder's name says little, so its fingerprint has to agree; a Hub id may have moved on.
            if (there.kind, there.name) == (source.kind, source.name) and (
                there.kind == "hub" or there.revision == source.revision
            ):
                return True
            found = f"a conversion of {there.name} ({there.revision})"
    if held and not destination.yes_overwrite:
        raise PublishError(
            f"{repo_id} exists and is no conversion of {source.name}: it holds {len(held)} files and {found}.",
            "Choose another --repo-id, or add --yes-overwrite to write over it.",
        )
    return False
