"""The repository to push to: what it holds, and whether it may be written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from converter.command_line import command_line
from converter.errors import LayoutError, PublishError, UsageError
from converter.manifest import MANIFEST_NAME, Manifest, SourceRecord, TokenizerRecord
from converter.output import converted_name


@dataclass(frozen=True)
class Destination:
    """Where the user wants a converted model to go.

    Attributes:
        repo_id: ``owner/name``, ``name`` for one's own, or None for the default name.
        private: the repository is created private.
        public: it may be public, although what was converted is not.
        revision: branch, or an open pull request's ``refs/pr/N``; None for ``main``.
        commit_message: None for a message that names the source.
        yes_overwrite: push over a repository that holds something else, another conversion included.
        dry_run: only look at what a push would do.
        scales_of: the converted folder, where its scales alone are pushed.
        push_anyway: push a model that its own table says is worse than its source.
    """

    repo_id: str | None = None
    private: bool = False
    public: bool = False
    revision: str | None = None
    commit_message: str | None = None
    yes_overwrite: bool = False
    dry_run: bool = False
    scales_of: Path | None = None
    push_anyway: bool = False

    @property
    def name(self) -> str:
        """The repository's name in messages."""
        return self.repo_id or "your repository"

    def push_line(self, folder: Path, repo_id: str | None = None) -> str:
        """The command that pushes ``folder`` there, or after a dry run the one that looks again."""
        names = ("revision", "commit_message", "private", "public", "yes_overwrite", "dry_run")
        options: dict[str, Any] = {"repo_id": repo_id or self.repo_id}
        options |= {name: getattr(self, name) for name in names}
        options |= {"scales_only": self.scales_of is not None, "push_anyway": self.push_anyway}
        return command_line("mmod push", [str(self.scales_of or folder)], options)


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub as it stands.

    Attributes:
        has_branch: whether the branch asked for is there; otherwise ``head`` and ``files`` are those of main.
        head: commit of the branch; None if the repository does not exist.
        files: path to what the Hub knows of the file.
    """

    exists: bool
    private: bool = False
    has_branch: bool = False
    head: str | None = None
    files: Mapping[str, RepoFile] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A repository that may be written.

    Attributes:
        is_ours: it holds a conversion of the same source.
        secret: why it must not be public, in words; empty if it may be.
    """

    repo_id: str
    repository: Repository
    is_ours: bool
    secret: str


def open_target(
    api: HfApi, destination: Destination, manifest: Manifest, target_len: int | None, *, is_made: bool = True
) -> Target:
    """Look at the repository and make sure that this user may push a conversion to it.

    Args:
        target_len: tokens, for the default name.
        is_made: the manifest is that of a finished conversion; without, only its sources are known.

    Raises:
        UsageError: options that exclude each other.
        PublishError: no right to write, the repository holds something else, or it is public and what was
            converted is not.
        HfHubHTTPError and others of the client: the Hub refused a request.
    """
    if destination.private and destination.public:
        raise UsageError("--private and --public exclude each other.", "Leave one of them out.")
    repo_id = destination.repo_id or converted_name(manifest.source.name, target_len, manifest.name_ending)
    if "/" not in repo_id:
        repo_id = f"{api.whoami(cache=True)['name']}/{repo_id}"
    repository = look_at(api, repo_id, destination.revision)
    _check_access(api, repo_id, repository)
    secret = _reason_for_privacy(api, destination, manifest)
    if secret and repository.exists and not repository.private:
        raise PublishError(
            f"{repo_id} is public, and {secret}.",
            "Make it private in its settings on the Hub, choose another --repo-id, or "
            + ("leave --private out." if destination.private else "add --public to publish it all the same."),
        )
    is_ours = _check_contents(api, repo_id, repository, destination, manifest, is_made)
    return Target(repo_id, repository, is_ours, secret)


def look_at(api: HfApi, repo_id: str, revision: str | None) -> Repository:
    """The contents of a repository at a branch or pull request."""
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


def _check_access(api: HfApi, repo_id: str, repository: Repository) -> None:
    """Whether this user may write there, or create the repository."""
    if repository.exists:
        api.auth_check(repo_id, write=True)
        return
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


def _reason_for_privacy(api: HfApi, destination: Destination, manifest: Manifest) -> str:
    """Why the conversion must not be public: its weights or its tokenizer are not public. Empty if it may be."""
    if destination.private:
        return "--private was given"
    if destination.public:
        return ""
    origins: list[SourceRecord | TokenizerRecord] = [manifest.source]
    origins += [manifest.tokenizer] if manifest.tokenizer else []
    for origin in origins:
        if origin.kind == "folder":
            return f"{origin.name} is a local folder"
        if origin.kind == "hub":
            try:
                info = api.model_info(origin.name)
            except RepositoryNotFoundError:
                return f"{origin.name} cannot be seen on the Hub"
            if info.private or info.gated:
                return f"{origin.name} is {'private' if info.private else 'gated'}"
    return ""


def _check_contents(
    api: HfApi,
    repo_id: str,
    repository: Repository,
    destination: Destination,
    manifest: Manifest,
    is_made: bool,
) -> bool:
    """Whether the repository holds a conversion of the same source; refuse to write over anything but this one.

    Raises:
        PublishError: it is neither empty nor this conversion, and ``yes_overwrite`` was not given.
    """
    source = manifest.source
    held = [path for path in repository.files if path != ".gitattributes"]
    found = "no manifest of this tool"
    if MANIFEST_NAME in held:
        path = api.hf_hub_download(repo_id, MANIFEST_NAME, revision=repository.head)
        try:
            present = Manifest.from_json(Path(path).read_bytes())
        except LayoutError as error:
            found = error.message
        else:
            there = present.source
            # A folder's name says little, so its fingerprint has to agree; a Hub id may have moved on.
            if (there.kind, there.name) == (source.kind, source.name) and (
                there.kind == "hub" or there.revision == source.revision
            ):
                is_same = is_made and present.makes_the_weights_of(manifest)
                # A new branch leaves the one it is made from as it is.
                if repository.has_branch and not (is_same or destination.yes_overwrite):
                    raise PublishError(
                        f"{repo_id} holds another conversion of {source.name} already.",
                        "Choose another --repo-id or branch, or add --yes-overwrite to replace it.",
                    )
                return True
            found = f"a conversion of {there.name} ({there.revision})"
    if held and not destination.yes_overwrite:
        raise PublishError(
            f"{repo_id} exists and is no conversion of {source.name}: it holds {len(held)} files and {found}.",
            "Choose another --repo-id, or add --yes-overwrite to write over it.",
        )
    return False
