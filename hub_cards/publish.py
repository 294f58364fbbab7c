"""The way to the Hub: check what can be checked early, plan what travels, and send it as one commit."""

from __future__ import annotations

import fnmatch
import hashlib
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
)
from huggingface_hub.errors import (
    BadRequestError,
    FileDuplicationError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from converter.console import Reporter
from converter.errors import LayoutError, PublishError, UsageError
from converter.manifest import MANIFEST_NAME, Manifest, SourceRecord
from hub_cards.card import CARD_NAME, Card, has_own_text, make_card
from hub_cards.metadata import card_metadata, converted_name, front_matter_block, length_name, split_card

# What transformers or mamba_ssm would load in place of the files that are sent.
WEIGHTS = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
)
COMMIT_WAITS = (1.0, 2.0, 4.0)
"""Seconds before a commit that met a server error is tried again; the client itself retries all but commits."""

Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete


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

    def push_line(self, folder: Path | None, repo_id: str | None = None) -> str:
        """The command that pushes ``folder`` there."""
        words = ["mmod", "push", str(folder) if folder is not None else "FOLDER"]
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
class LocalFile:
    """A file as it is to stand in the repository; ``content`` is a path or the bytes themselves."""

    path: str
    content: Path | bytes = field(repr=False)

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content, by which the Hub knows large files."""
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        with self.content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def git_oid(self) -> str:
        """Git's name of the content, by which the Hub knows small files."""
        content = self.content.read_bytes() if isinstance(self.content, Path) else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def equals(self, remote: RepoFile) -> bool:
        """Whether a file on the Hub has the same content; nothing is hashed where the sizes differ."""
        if self.size != remote.size:
            return False
        return self.sha256 == remote.lfs.sha256 if remote.lfs is not None else self.git_oid == remote.blob_id


@dataclass(frozen=True)
class PushPlan:
    """What a push will do.

    Attributes:
        exists, has_branch: whether the repository, and the branch in it, are there already.
        parent_commit: the commit that the push builds on; None where the repository is yet to be created.
        uploads: files to send.
        copies: large files that equal the source's, to be copied on the server from ``source``'s commit.
        deletions: weights of an earlier push that would be loaded by mistake.
        unchanged: paths that hold the right content already.
        pull_request: address of an open pull request with the same content, else "".
    """

    folder: Path
    destination: Destination
    repo_id: str
    source: SourceRecord
    card: Card
    message: str
    exists: bool
    has_branch: bool
    parent_commit: str | None
    uploads: tuple[LocalFile, ...]
    copies: tuple[LocalFile, ...]
    deletions: tuple[str, ...]
    unchanged: tuple[str, ...]
    pull_request: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether everything is in place already."""
        return bool(self.pull_request) or not (self.uploads or self.copies or self.deletions)

    @property
    def upload_bytes(self) -> int:
        """Bytes to send at most; the Hub's chunk store may know some of them."""
        return sum(file.size for file in self.uploads)

    @property
    def copy_bytes(self) -> int:
        """Bytes that stay on the server."""
        return sum(file.size for file in self.copies)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "repo_id": self.repo_id,
            "exists": self.exists,
            "upload": {file.path: file.size for file in self.uploads},
            "copy": {file.path: file.size for file in self.copies},
            "delete": list(self.deletions),
            "unchanged": list(self.unchanged),
            "upload_bytes": self.upload_bytes,
            "copy_bytes": self.copy_bytes,
        }

    def show(self, reporter: Reporter) -> None:
        """Print what would travel."""
        rows = [(file.path, "copy on the server", size_name(file.size)) for file in self.copies]
        rows += [(file.path, "upload", size_name(file.size)) for file in self.uploads]
        rows += [(path, "delete", "") for path in self.deletions]
        rows += [(path, "unchanged", "") for path in self.unchanged]
        what = "Pull request to" if self.destination.create_pr else "Push to"
        reporter.table(f"{what} {self.repo_id}{'' if self.exists else ' (new)'}", ("File", "What", "Size"), rows)
        reporter.line(
            f"At most {size_name(self.upload_bytes)} to upload (the Hub's chunk store may know some of it), "
            f"{size_name(self.copy_bytes)} copied on the server."
        )


@dataclass(frozen=True)
class PushResult:
    """What a push did: the address to look at, and the commit, or None where nothing had to be done."""

    url: str
    commit: str | None


@dataclass(frozen=True)
class _Repository:
    """A repository on the Hub as it stands; ``files`` are those of the branch, or of main where it is missing."""

    exists: bool
    private: bool = False
    has_branch: bool = False
    head: str | None = None
    files: Mapping[str, RepoFile] = field(default_factory=dict)


def check_push(
    destination: Destination, source: SourceRecord, *, source_card: str | None, target_len: int | None
) -> str:
    """Find out, before anything slow, whether a push can work, and return the repository's id.

    Checked are the login, the right to write, the name, what the repository holds, and the card's metadata.

    Raises:
        UsageError: options that exclude each other, or a name that the Hub does not take.
        PublishError: the push would be refused.
    """
    _check_options(destination)
    api = _api()
    with hub_errors(destination.push_line(None)):
        repo_id = _full_id(api, destination.repo_id, source, target_len)
        repository = _look_at(api, repo_id, destination.revision)
        _check_access(api, repo_id, repository, destination)
        _check_contents(api, repo_id, repository, destination, source)
        metadata = card_metadata(_manifest_to_come(source), split_card(source_card or "").metadata, repo_id)
        _check_metadata(front_matter_block(metadata))
    return repo_id


def plan_push(folder: Path, destination: Destination, *, reporter: Reporter | None = None) -> PushPlan:
    """Compare a converted folder with the Hub and say what has to travel. Nothing is written or sent.

    Raises:
        UsageError: options that exclude each other, or a name that the Hub does not take.
        PublishError: the folder is no conversion, or the push would be refused.
    """
    reporter = reporter or Reporter(quiet=True)
    _check_options(destination)
    manifest = Manifest.read(folder)
    if manifest is None:
        raise PublishError(f"{folder} is no conversion of this tool.", "Give a folder that mmod-convert wrote.")
    source, api = manifest.source, _api()
    target_len = manifest.calibration.target_len if manifest.calibration else None
    with hub_errors(destination.push_line(folder)):
        repo_id = _full_id(api, destination.repo_id, source, target_len)
        repository = _look_at(api, repo_id, destination.revision)
        _check_access(api, repo_id, repository, destination)
        is_ours = _check_contents(api, repo_id, repository, destination, source)
        present = _card_to_keep(api, repo_id, repository, folder) if is_ours else None
        card = make_card(folder, manifest, source_card=None, repo_id=repo_id, present=present)
        _check_metadata(card.text)
        files = _local_files(folder, card)
        with reporter.task("Comparing with the Hub (files)", len(files)) as task:
            unchanged, uploads, copies = [], [], []
            copyable = _copyable_files(api, source, reporter) if source.kind == "hub" else {}
            for file in files:
                if file.path in repository.files and file.equals(repository.files[file.path]):
                    unchanged.append(file.path)
                elif file.path in copyable and file.equals(copyable[file.path]):
                    copies.append(file)
                else:
                    uploads.append(file)
                task.advance()
        plan = PushPlan(
            folder=folder,
            destination=destination,
            repo_id=repo_id,
            source=source,
            card=card,
            message=destination.commit_message or _default_message(source, target_len),
            exists=repository.exists,
            has_branch=repository.has_branch,
            parent_commit=repository.head,
            uploads=tuple(uploads),
            copies=tuple(copies),
            deletions=_stale_weights(repository, {file.path for file in files}),
            unchanged=tuple(unchanged),
        )
        if destination.create_pr:
            plan = replace(plan, pull_request=_same_pull_request(api, plan, files))
    return plan


def push(plan: PushPlan, *, reporter: Reporter | None = None) -> PushResult:
    """Carry out a plan in one commit; what an earlier attempt left on the server is not sent again.

    The folder's card is brought up to date first, so that folder and repository hold the same.

    Raises:
        PublishError: the Hub refused or failed; the folder is complete, and the error gives the line to go on.
    """
    reporter = reporter or Reporter(quiet=True)
    api = _api()
    if plan.is_empty:
        return PushResult(plan.pull_request or f"{api.endpoint}/{plan.repo_id}", None)
    plan.card.write(plan.folder)
    with hub_errors(plan.destination.push_line(plan.folder, plan.repo_id)), _quiet_client(reporter):
        plan = _prepare_repository(api, plan)
        adds = [CommitOperationAdd(file.path, file.content) for file in plan.uploads]
        deletions = [CommitOperationDelete(path) for path in plan.deletions]
        copies = [
            CommitOperationCopy(
                file.path,
                file.path,
                src_revision=plan.source.revision,
                src_repo_id=plan.source.name,
                src_repo_type="model",
            )
            for file in plan.copies
        ]
        try:
            info = _commit(api, plan, [*copies, *adds, *deletions])
        except (FileDuplicationError, HfHubHTTPError) as error:
            if not (copies and _is_about_copies(error, plan)):
                raise
            reporter.warn(
                f"The Hub would not copy from {plan.source.name} ({_words(error)}), so "
                f"{size_name(plan.copy_bytes)} more are uploaded."
            )
            uploaded_instead = [CommitOperationAdd(file.path, file.content) for file in plan.copies]
            info = _commit(api, plan, [*uploaded_instead, *adds, *deletions])
    return PushResult(info.pr_url or f"{api.endpoint}/{plan.repo_id}", info.oid)


# Before a plan


def _api() -> HfApi:
    """The client, which takes endpoint, token and offline mode from the environment."""
    return HfApi(library_name="mmod-convert")


def _check_options(destination: Destination) -> None:
    if destination.create_pr and destination.revision not in (None, "main"):
        raise UsageError(
            "--create-pr opens a pull request against main, so it excludes --revision.",
            "To go on in an open pull request, use --revision refs/pr/N alone.",
        )


def _full_id(api: HfApi, repo_id: str | None, source: SourceRecord, target_len: int | None) -> str:
    if repo_id is not None and "/" in repo_id:
        return repo_id
    owner = api.whoami(cache=True)["name"]
    return f"{owner}/{repo_id or converted_name(source.name, target_len)}"


def _look_at(api: HfApi, repo_id: str, revision: str | None) -> _Repository:
    try:
        info, has_branch = api.model_info(repo_id, revision=revision), True
    except RevisionNotFoundError:
        info, has_branch = api.model_info(repo_id), False
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return _Repository(exists=False)
    entries = api.list_repo_tree(repo_id, recursive=True, revision=info.sha)
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    return _Repository(True, bool(info.private), has_branch, info.sha, files)


def _check_access(api: HfApi, repo_id: str, repository: _Repository, destination: Destination) -> None:
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
    api: HfApi, repo_id: str, repository: _Repository, destination: Destination, source: SourceRecord
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
            there = Manifest.from_json(Path(path).read_text(encoding="utf-8")).source
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


def _card_to_keep(api: HfApi, repo_id: str, repository: _Repository, folder: Path) -> str | None:
    """The repository's card where someone wrote into it and nobody wrote into the folder's, else None."""
    if CARD_NAME not in repository.files:
        return None
    card = Path(api.hf_hub_download(repo_id, CARD_NAME, revision=repository.head)).read_text(encoding="utf-8")
    local = folder / CARD_NAME
    if has_own_text(card) and not (local.is_file() and has_own_text(local.read_text(encoding="utf-8"))):
        return card
    return None


def _manifest_to_come(source: SourceRecord) -> Manifest:
    """What is known of a conversion before it starts, as far as the card's metadata goes."""
    return Manifest(
        source=source,
        target="A",
        form="linear",
        granularity="layer",
        load_dtype="",
        changed=[],
        identical_tensors=0,
        texts=[],
        calibration=None,
        perplexity=None,
        versions={},
        command="",
    )


def _check_metadata(card: str) -> None:
    try:
        ModelCard(card, ignore_metadata_errors=True).validate()
    except HfHubHTTPError:
        raise
    except ValueError as error:
        raise PublishError(
            f"The Hub does not take the card's metadata: {_words(error)}.",
            f"Put the source's card or the top of {CARD_NAME} right.",
        ) from error


# What travels


def _local_files(folder: Path, card: Card) -> list[LocalFile]:
    """The folder's files with the card as it will be; hidden ones stay where they are."""
    found: dict[str, Path | bytes] = {picture.path: picture.png for picture in card.pictures}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            found[relative.as_posix()] = path
    found[CARD_NAME] = card.text.encode()
    return [LocalFile(path, content) for path, content in sorted(found.items())]


def _copyable_files(api: HfApi, source: SourceRecord, reporter: Reporter) -> dict[str, RepoFile]:
    """The source's files that the Hub can copy: those in its chunk store. Small files are cheaper to send."""
    try:
        entries = list(api.list_repo_tree(source.name, recursive=True, revision=source.revision))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        reporter.warn(f"{source.name} cannot be read any more ({_words(error)}), so nothing is copied from it.")
        return {}
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile) and entry.lfs and entry.xet_hash}


def _stale_weights(repository: _Repository, kept: set[str]) -> tuple[str, ...]:
    return tuple(
        path
        for path in sorted(repository.files)
        if path not in kept and any(fnmatch.fnmatch(path.split("/")[-1], pattern) for pattern in WEIGHTS)
    )


def _default_message(source: SourceRecord, target_len: int | None) -> str:
    goal = f" for {length_name(target_len)} tokens" if target_len else ""
    return f"{source.name} with its spectrum scaled{goal}"


def _same_pull_request(api: HfApi, plan: PushPlan, files: Sequence[LocalFile]) -> str:
    """Address of an open pull request of this user that holds the same files, else ""."""
    author = api.whoami(cache=True)["name"]
    pulls = api.get_repo_discussions(
        plan.repo_id, author=author, discussion_type="pull_request", discussion_status="open"
    )
    for pull in pulls:
        if pull.title == plan.message and pull.git_reference is not None:
            there = _look_at(api, plan.repo_id, pull.git_reference).files
            if all(file.path in there and file.equals(there[file.path]) for file in files):
                return pull.url
    return ""


# Sending


def _prepare_repository(api: HfApi, plan: PushPlan) -> PushPlan:
    """Create the repository and the branch where they are missing."""
    if not plan.exists:
        # None leaves the choice to the organisation's default.
        api.create_repo(plan.repo_id, private=True if plan.destination.private else None)
        plan = replace(plan, exists=True, parent_commit=api.model_info(plan.repo_id).sha)
    revision = plan.destination.revision
    if revision is not None and revision != "main" and not plan.has_branch:
        api.create_branch(plan.repo_id, branch=revision, exist_ok=False)
    return plan


def _commit(api: HfApi, plan: PushPlan, operations: list[Operation]) -> CommitInfo:
    """Make the commit; one that met a server error or lost its answer is tried again unless it arrived."""

    def send() -> CommitInfo:
        return api.create_commit(
            plan.repo_id,
            operations,
            commit_message=plan.message,
            revision=plan.destination.revision,
            create_pr=plan.destination.create_pr,
            parent_commit=plan.parent_commit,
        )

    for wait in COMMIT_WAITS:
        try:
            return send()
        except HTTPError as error:
            if not _is_failed_commit(error):
                raise
        time.sleep(wait)
        if (arrived := _arrived_commit(api, plan)) is not None:
            return arrived
    return send()


def _is_failed_commit(error: HTTPError) -> bool:
    """Whether the request that makes the commit failed without a refusal."""
    try:
        path = error.request.url.path
    except RuntimeError:
        return False
    refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
    return "/commit/" in path and not refused


def _arrived_commit(api: HfApi, plan: PushPlan) -> CommitInfo | None:
    """The commit of a request whose answer was lost, else None."""
    files = [*plan.uploads, *plan.copies]
    if plan.destination.create_pr:
        url = _same_pull_request(api, plan, files)
        info = CommitInfo(f"{api.endpoint}/{plan.repo_id}/commit/main", plan.message, "", "", pr_url=url)
        return info if url else None
    there = _look_at(api, plan.repo_id, plan.destination.revision)
    if there.head == plan.parent_commit or there.head is None:
        return None
    if all(file.path in there.files and file.equals(there.files[file.path]) for file in files):
        return CommitInfo(f"{api.endpoint}/{plan.repo_id}/commit/{there.head}", plan.message, "", there.head)
    return None


def _is_about_copies(error: Exception, plan: PushPlan) -> bool:
    """Whether the Hub refused to copy, rather than the push itself."""
    if not isinstance(error, HfHubHTTPError):
        return True
    path = error.response.request.url.path
    about_source = path.startswith((f"/api/models/{plan.source.name}/", f"/{plan.source.name}/"))
    return about_source or ("/commit/" in path and isinstance(error, BadRequestError))


@contextmanager
def _quiet_client(reporter: Reporter) -> Iterator[None]:
    """The client draws its own progress bars; keep them off where the user asked for quiet."""
    if not reporter.quiet or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# What went wrong


@contextmanager
def hub_errors(push_line: str) -> Iterator[None]:
    """Turn what the client raises within the block into a PublishError that keeps the server's words.

    Args:
        push_line: the command to go on with.
    """
    try:
        yield
    except HFValidationError as error:
        raise UsageError(
            f"That is no name for a repository: {_words(error)}", "Give --repo-id OWNER/NAME."
        ) from error
    except (HTTPError, OSError, RuntimeError, ValueError, FileDuplicationError) as error:
        cause = _root(error)
        message, fix = _explain(cause)
        raise PublishError(f"{message}: {_words(cause)}", f"{fix} Then go on with: {push_line}".strip()) from error


def _root(error: BaseException) -> BaseException:
    """The client's own error, which it wraps where an upload failed."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, (HTTPError, OSError)):
        error = error.__cause__
    return error


def _explain(error: BaseException) -> tuple[str, str]:
    """What happened, and what the user can do about it."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    is_full = status in (402, 413, 507) or (status == 403 and re.search(r"quota|storage", _words(error).lower()))
    explanations: list[tuple[object, str, str]] = [
        (
            isinstance(error, LocalTokenNotFoundError),
            "You are not logged in",
            "Run `hf auth login`, or set HF_TOKEN.",
        ),
        (isinstance(error, OfflineModeIsEnabled), "The Hub client is in offline mode", "Unset HF_HUB_OFFLINE."),
        (isinstance(error, GatedRepoError), "The repository is gated", "Accept its terms on its page on the Hub."),
        (is_full, "There is no room for this on the Hub", "Free some, or choose another owner with --repo-id."),
        (status == 401, "The Hub does not take your token", "Run `hf auth login`, or set HF_TOKEN."),
        (
            status == 403,
            "You may not do this with your token",
            "Use a token with write access (hf auth login), or choose another --repo-id.",
        ),
        (status == 404, "The Hub cannot find this", "Check --repo-id and --revision."),
        (status == 409, "The name is taken", "Choose another --repo-id."),
        (
            status == 412,
            "Someone changed the repository in the meantime, so nothing was written",
            "Look at the change on the Hub.",
        ),
        (status == 429, "The Hub asks for fewer requests", "Wait a while."),
        (status >= 500, "The Hub failed, and retries did not help", "Wait a while."),
        (status, "The Hub refused this", "See what it says."),
        (isinstance(error, HTTPError), "The connection to the Hub broke", "Check the network."),
        (isinstance(error, OSError), "A file cannot be read, or the Hub not be reached", "Check disk and network."),
        (True, "The Hub's client could not go on", "See what it says."),
    ]
    return next((message, fix) for holds, message, fix in explanations if holds)


def _words(error: BaseException) -> str:
    """What the error says, in one line, without what opens doors: signed links' queries and tokens."""
    text = (error.server_message if isinstance(error, HfHubHTTPError) else None) or str(error) or repr(error)
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", " ".join(text.split()))
    return re.sub(r"\bhf_\w+", "hf_...", text)


def size_name(size: int) -> str:
    """A number of bytes as people say it."""
    for unit, amount in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= amount:
            return f"{size / amount:.1f} {unit}"
    return f"{size} B"
