"""Pushes a conversion to the Hub: early checks, a plan of what is sent, and one commit."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from converter.checkpoint_files import in_short, is_own
from converter.digests import is_sealed, sealed, sha256_of
from converter.disk import size_name
from converter.errors import PublishError, VerificationError, redacted_message
from converter.hub import hub_errors
from converter.lengths import format_length
from converter.manifest import OWN_FOLDER, Manifest, SourceRecord
from converter.reporting import SILENT, Reporter
from converter.scales_file import find_scales, load_stored_scales
from converter.source import Snapshot, resolve
from hub_cards.card import CARD_NAME, Card, has_own_text, make_card, read_card
from hub_cards.destination import Destination, Repository, Target, look_at, open_target
from hub_cards.metadata import card_metadata, front_matter_block, split_card

# What some program would load in place of, or beside, the files that are sent.
WEIGHTS = re.compile(
    r"model[^/]*\.safetensors|model\.safetensors\.index\.json|pytorch_model[^/]*\.bin(\.index\.json)?"
)
COMMIT_WAITS = (1.0, 2.0, 4.0)
"""Seconds before a commit that met a server error is tried again; the client itself retries all but commits."""

Operation = CommitOperationAdd | CommitOperationDelete


@dataclass(frozen=True)
class LocalFile:
    """A file for the repository; ``content`` is a path or the bytes themselves."""

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
        return sha256_of(self.content)

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
        secret: why the repository must not be public, in words; empty if it may be.
        parent_commit: the commit that the push builds on; None if the repository is yet to be created.
        uploads: files to send.
        deletions: files of an earlier push that would be loaded or shown by mistake.
        unchanged: paths that hold the right content already.
        left_out: paths in the folder that are not sent.
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
    secret: str
    parent_commit: str | None
    uploads: tuple[LocalFile, ...]
    deletions: tuple[str, ...]
    unchanged: tuple[str, ...]
    left_out: tuple[str, ...]
    pull_request: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether everything is in place already."""
        return bool(self.pull_request) or not (self.uploads or self.deletions)

    @property
    def upload_bytes(self) -> int:
        """Bytes to send at most; the Hub's chunk store may know some of them."""
        return sum(file.size for file in self.uploads)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "repo_id": self.repo_id,
            "exists": self.exists,
            "private": bool(self.secret),
            "upload": {file.path: file.size for file in self.uploads},
            "delete": list(self.deletions),
            "unchanged": list(self.unchanged),
            "not_sent": list(self.left_out),
            "upload_bytes": self.upload_bytes,
        }

    def show(self, reporter: Reporter) -> None:
        """Print the plan."""
        what = "Pull request to" if self.destination.create_pr else "Push to"
        new = "new, private" if self.secret else "new"
        _say_private(self.repo_id, self.secret, self.destination, reporter)
        rows = [(file.path, "upload", size_name(file.size)) for file in self.uploads]
        rows += [(path, "delete", "") for path in self.deletions]
        rows += [(path, "unchanged", "") for path in self.unchanged]
        # A table's own title would be broken at the table's width.
        reporter.line(f"{what} {self.repo_id}{'' if self.exists else f' ({new})'}:")
        reporter.table("", ("File", "What", "Size"), rows)
        reporter.line(
            f"At most {size_name(self.upload_bytes)} to upload (the Hub's chunk store may know some of it)."
        )
        if self.left_out:
            reporter.line(f"Not sent, since no loader reads it: {in_short(self.left_out)}")


@dataclass(frozen=True)
class PushResult:
    """What a push did: the address to look at, and the commit, or None if nothing had to be done."""

    url: str
    commit: str | None


def check_push(
    destination: Destination,
    manifest: Manifest,
    *,
    source_card: str | None,
    target_len: int | None,
    reporter: Reporter = SILENT,
) -> str:
    """Find out, before anything slow, whether a push can work, and return the repository's id.

    Checked are the login, the right to write, the name, what the repository holds, and the card's metadata.

    Args:
        manifest: what is known before the conversion.
        source_card: the source's README.md at the commit that is to be converted.
        target_len: tokens the model is to be calibrated for.

    Raises:
        UsageError: options that exclude each other, or a name that the Hub does not take.
        PublishError: the push would be refused.
    """
    with hub_errors(destination.name, PublishError):
        target = open_target(_api(), destination, manifest, target_len, is_made=False)
        metadata = card_metadata(manifest, split_card(source_card or "").metadata, target.repo_id)
        _check_metadata(front_matter_block(metadata))
    _say_private(target.repo_id, target.secret, destination, reporter)
    return target.repo_id


def _say_private(repo_id: str, secret: str, destination: Destination, reporter: Reporter) -> None:
    """Say why the repository is private, unless --private was given."""
    if secret and not destination.private:
        reporter.line(f"{repo_id} is kept private, since {secret}; --public publishes it.")


def plan_push(folder: Path, destination: Destination, *, reporter: Reporter = SILENT) -> PushPlan:
    """Compare a converted folder with the Hub and plan what to send. Nothing is written or sent.

    Raises:
        UsageError: options that exclude each other, or a name that the Hub does not take.
        PublishError: the folder is no conversion, or the push would be refused.
        VerificationError: a file is not what the conversion wrote.
    """
    manifest = Manifest.read(folder)
    if manifest is None:
        raise PublishError(f"{folder} is no conversion of this tool.", "Give a folder that mmod-convert wrote.")
    if manifest.scales_nothing:
        raise PublishError(f"In {folder} every factor is 1, so it is the source again: nothing is pushed.")
    if manifest.is_worse and not destination.push_anyway:
        raise PublishError(
            f"By its own table {folder} is worse than its source at every length.",
            "Calibrate otherwise, or add --push-anyway.",
        )
    # Checked before any request: the files are as they were written, without links that leave the folder.
    snapshot = _open_conversion(folder)
    proved = _prove(snapshot, reporter)
    source, api = manifest.source, _api()
    target_len = manifest.calibration.target_len if manifest.calibration else None
    with hub_errors(destination.name, PublishError, _go_on(destination.push_line(folder))):
        target = open_target(api, destination, manifest, target_len)
        repo_id, repository = target.repo_id, target.repository
        present = _card_to_keep(api, target, folder) if target.is_ours else None
        card = make_card(folder, manifest, source_card=None, repo_id=repo_id, present=present, redraw=False)
        for warning in card.warnings:
            reporter.warn(warning)
        _check_metadata(card.text)
        files = _local_files(folder, card, proved)
        with reporter.task("Comparing with the Hub (files)", len(files)) as task:
            unchanged, uploads = [], []
            for file in files:
                if file.path in repository.files and file.equals(repository.files[file.path]):
                    unchanged.append(file.path)
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
            secret=target.secret,
            parent_commit=repository.head,
            uploads=tuple(uploads),
            deletions=_stale_files(repository, {file.path for file in files}),
            unchanged=tuple(unchanged),
            left_out=snapshot.left_out,
        )
        if destination.create_pr:
            pull = _same_pull_request(api, plan, files)
            plan = replace(plan, pull_request=pull.url if pull else "")
    return plan


@contextmanager
def scales_alone(folder: Path) -> Iterator[Path]:
    """A temporary folder with a conversion's scales, manifest and pictures, and none of its weights.

    Raises:
        PublishError: the folder is no conversion, or its scales do not say for which A_log they were found.
    """
    manifest = Manifest.read(folder)
    if manifest is None or find_scales(folder) is None:
        raise PublishError(f"{folder} holds no scales of this tool.", "Give a folder that mmod-convert wrote.")
    if not load_stored_scales(str(folder)).base:
        raise PublishError(
            f"The scales in {folder} do not say for which A_log they were found, so they could not be "
            "compared with another model.",
            "Write them into their base again with `mmod bake`, and push the scales of that folder.",
        )
    with tempfile.TemporaryDirectory(prefix="mmod-") as temporary:
        alone = Path(temporary) / folder.absolute().name
        shutil.copytree(folder / OWN_FOLDER, alone / OWN_FOLDER)
        sealed(replace(manifest, scales_only=True), alone).write(alone)
        yield alone


def push(plan: PushPlan, *, reporter: Reporter = SILENT) -> PushResult:
    """Carry out a plan in one commit; what an earlier attempt left on the server is not sent again.

    The folder's card is brought up to date first, so that folder and repository hold the same.

    Raises:
        PublishError: the Hub refused or failed; the folder is complete, and the error gives the line to go on.
    """
    api = _api()
    if plan.is_empty:
        return PushResult(plan.pull_request or f"{api.endpoint}/{plan.repo_id}", None)
    plan.card.write(plan.folder)
    then = _go_on(plan.destination.push_line(plan.folder, plan.repo_id))
    with hub_errors(plan.repo_id, PublishError, then), _quiet_client(reporter):
        plan = _prepare_repository(api, plan)
        adds = [CommitOperationAdd(file.path, file.content) for file in plan.uploads]
        deletions = [CommitOperationDelete(path) for path in plan.deletions]
        info = _commit(api, plan, [*adds, *deletions], reporter)
    return PushResult(info.pr_url or f"{api.endpoint}/{plan.repo_id}", info.oid)


def _go_on(line: str) -> str:
    return f"Then go on with: {line}"


# The card and the Hub


def _api() -> HfApi:
    """The client, which takes endpoint, token and offline mode from the environment."""
    return HfApi(library_name="mmod-convert")


def _card_to_keep(api: HfApi, target: Target, folder: Path) -> str | None:
    """The repository's card if it has text added by hand and the folder's has none, else None."""
    if CARD_NAME not in target.repository.files:
        return None
    path = Path(api.hf_hub_download(target.repo_id, CARD_NAME, revision=target.repository.head))
    there, here = read_card(path.parent), read_card(folder)
    return there if there and has_own_text(there) and not (here and has_own_text(here)) else None


def _check_metadata(card: str) -> None:
    try:
        ModelCard(card, ignore_metadata_errors=True).validate()
    except HfHubHTTPError:
        raise
    except ValueError as error:
        raise PublishError(
            f"The Hub does not take the card's metadata: {redacted_message(error)}.",
            f"Put the source's card or the top of {CARD_NAME} right.",
        ) from error


# The files


def _local_files(folder: Path, card: Card, written: Sequence[LocalFile] | None = None) -> list[LocalFile]:
    """The files of a converted model, with its new card; other files in the folder are not sent.

    Args:
        written: what the folder holds of it, where that is known.
    """
    if written is None:
        written = _written_files(_open_conversion(folder))
    found = {file.path: file for file in written}
    found |= {picture.path: LocalFile(picture.path, picture.png) for picture in card.pictures}
    found[CARD_NAME] = LocalFile(CARD_NAME, card.text.encode())
    return [file for _, file in sorted(found.items())]


def _written_files(snapshot: Snapshot) -> list[LocalFile]:
    """The files of a converted folder that belong to the model."""
    paths = {*snapshot.weights, *filter(None, [snapshot.index]), *snapshot.carried, *snapshot.own}
    return [LocalFile(path, snapshot.folder / path) for path in sorted(paths)]


def _open_conversion(folder: Path) -> Snapshot:
    """A converted folder's snapshot. A path alone could be the name of a demo."""
    return resolve(str(folder.absolute()), compose=True)


def _prove(snapshot: Snapshot, reporter: Reporter) -> list[LocalFile]:
    """The files to send, after comparing them with the digests that were recorded when they were written.

    Raises:
        VerificationError: a file changed, was added or is gone, or there are no digests.
    """
    folder, manifest, files = snapshot.folder, snapshot.manifest, _written_files(snapshot)
    assert manifest is not None
    if not manifest.files:
        base = "BASE" if manifest.source.kind == "folder" else manifest.source.name
        raise VerificationError(
            f"{folder} is of an earlier version, which recorded no digests to prove it by.",
            f"Write it again: {shlex.join(['mmod', 'bake', base, 'OUTPUT', '--scales', str(folder)])}",
        )
    present = {file.path: file for file in files if is_sealed(file.path)}
    with reporter.task("Proving the folder (files)", len(present)) as task:
        for path in sorted({**manifest.files, **present}):
            said = "is gone" if path not in present else "was added"
            if path in present and path in manifest.files:
                said = "" if present[path].sha256 == manifest.files[path] else "changed"
            if said:
                raise VerificationError(
                    f"{path} {said} since {folder} was written.",
                    "Put it right, or convert again. What is pushed is what its manifest says.",
                )
            task.advance()
    return files


def _stale_files(repository: Repository, kept: set[str]) -> tuple[str, ...]:
    """Files of an earlier push to delete: weights that would be loaded, and this tool's own files."""
    gone = sorted(repository.files.keys() - kept)
    return tuple(path for path in gone if WEIGHTS.fullmatch(path) or is_own(path))


def _default_message(source: SourceRecord, target_len: int | None) -> str:
    goal = f" for {format_length(target_len)} tokens" if target_len else ""
    return f"{source.name} with its spectrum scaled{goal}"


@dataclass(frozen=True)
class _PullRequest:
    """Address and newest commit of an open pull request."""

    url: str
    head: str


def _same_pull_request(api: HfApi, plan: PushPlan, files: Sequence[LocalFile]) -> _PullRequest | None:
    """An open pull request of this user that holds the same files."""
    author = api.whoami(cache=True)["name"]
    pulls = api.get_repo_discussions(
        plan.repo_id, author=author, discussion_type="pull_request", discussion_status="open"
    )
    for pull in pulls:
        if pull.title == plan.message and pull.git_reference is not None:
            there = look_at(api, plan.repo_id, pull.git_reference)
            if there.head is not None and _holds(there, files):
                return _PullRequest(pull.url, there.head)
    return None


def _holds(repository: Repository, files: Sequence[LocalFile]) -> bool:
    present = repository.files
    return all(file.path in present and file.equals(present[file.path]) for file in files)


# Sending


def _prepare_repository(api: HfApi, plan: PushPlan) -> PushPlan:
    """Create the repository and the branch where they are missing."""
    if not plan.exists:
        # None leaves the choice to the organisation's default.
        private = True if plan.secret else False if plan.destination.public else None
        api.create_repo(plan.repo_id, private=private)
        plan = replace(plan, exists=True, parent_commit=api.model_info(plan.repo_id).sha)
    revision = plan.destination.revision
    if revision is not None and revision != "main" and not plan.has_branch:
        api.create_branch(plan.repo_id, branch=revision, exist_ok=False)
    return plan


def _commit(api: HfApi, plan: PushPlan, operations: list[Operation], reporter: Reporter) -> CommitInfo:
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
            reporter.warn(f"The commit failed ({redacted_message(error)}); trying again in {wait:.0f} s.")
        time.sleep(wait)
        if (arrived := _arrived_commit(api, plan)) is not None:
            return arrived
    return send()


def _is_failed_commit(error: HTTPError) -> bool:
    """Whether the request that makes the commit failed without a refusal."""
    refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
    try:
        request = error.response.request if isinstance(error, HfHubHTTPError) else error.request
    except RuntimeError:
        # It was never made.
        return False
    return "/commit/" in str(request.url.path) and not refused


def _arrived_commit(api: HfApi, plan: PushPlan) -> CommitInfo | None:
    """The commit of a request whose answer was lost, else None."""
    files = plan.uploads
    commits = f"{api.endpoint}/{plan.repo_id}/commit"
    if plan.destination.create_pr:
        pull = _same_pull_request(api, plan, files)
        return CommitInfo(f"{commits}/{pull.head}", plan.message, "", pull.head, pr_url=pull.url) if pull else None
    there = look_at(api, plan.repo_id, plan.destination.revision)
    if there.head in (None, plan.parent_commit) or not _holds(there, files):
        return None
    return CommitInfo(f"{commits}/{there.head}", plan.message, "", str(there.head))


@contextmanager
def _quiet_client(reporter: Reporter) -> Iterator[None]:
    """Switch off the client's progress bars with ``--quiet``."""
    if not reporter.quiet or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
