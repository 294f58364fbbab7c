"""Pushes a conversion to the Hub: early checks, a plan of what is sent, and one commit."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from converter.checkpoint_files import in_short, is_own
from converter.digests import is_sealed, sealed
from converter.disk import size_name
from converter.errors import PublishError, VerificationError, redacted_message
from converter.hub import hub_errors
from converter.lengths import format_length
from converter.manifest import OWN_FOLDER, Manifest
from converter.reporting import SILENT, Reporter
from converter.scales_file import find_scales
from converter.source import Snapshot, resolve
from hub_cards.card import CARD_NAME, Card, has_own_text, make_card, read_card
from hub_cards.destination import Destination, Target, look_at, open_target
from hub_cards.metadata import card_metadata, front_matter_block, split_card

# What some program would load in place of, or beside, the files that are sent.
WEIGHTS = re.compile(
    r"model[^/]*\.safetensors|model\.safetensors\.index\.json|pytorch_model[^/]*\.bin(\.index\.json)?"
)
COMMIT_WAITS = (1.0, 2.0, 4.0)
"""Seconds before a commit that met a server error is tried again; the client itself retries all but commits."""


class LocalFile(CommitOperationAdd):
    """A file to send, hashed when it is made."""

    @property
    def path(self) -> str:
        """In the repository."""
        return self.path_in_repo


@dataclass(frozen=True)
class PushPlan:
    """What a push will do.

    Attributes:
        uploads: files to send; the client takes each file's SHA-256 once, when it is first asked for.
        deletions: files of an earlier push that would be loaded or shown by mistake.
        unchanged: paths that hold the right content already.
        left_out: paths in the folder that are not sent.
    """

    folder: Path
    destination: Destination
    target: Target
    card: Card
    message: str
    uploads: tuple[LocalFile, ...]
    deletions: tuple[str, ...]
    unchanged: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def repo_id(self) -> str:
        """Where the files go."""
        return self.target.repo_id

    @property
    def is_empty(self) -> bool:
        """Whether everything is in place already."""
        return not (self.uploads or self.deletions)

    @property
    def upload_bytes(self) -> int:
        """Bytes to send at most; the Hub's chunk store may know some of them."""
        return sum(self._sizes.values())

    @property
    def _sizes(self) -> dict[str, int]:
        return {file.path_in_repo: file.upload_info.size for file in self.uploads}

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "repo_id": self.repo_id,
            "exists": self.target.repository.exists,
            "private": bool(self.target.secret),
            "upload": self._sizes,
            "delete": list(self.deletions),
            "unchanged": list(self.unchanged),
            "not_sent": list(self.left_out),
            "upload_bytes": self.upload_bytes,
        }

    def show(self, reporter: Reporter) -> None:
        """Print the plan."""
        new = " (new, private)" if self.target.secret else " (new)"
        _say_private(self.target, self.destination, reporter)
        rows = [(path, "upload", size_name(size)) for path, size in self._sizes.items()]
        rows += [(path, "delete", "") for path in self.deletions]
        rows += [(path, "unchanged", "") for path in self.unchanged]
        # A table's own title would be broken at the table's width.
        reporter.line(f"Push to {self.repo_id}{'' if self.target.repository.exists else new}:")
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
    _say_private(target, destination, reporter)
    return target.repo_id


def _say_private(target: Target, destination: Destination, reporter: Reporter) -> None:
    """Say why the repository is private, unless --private was given."""
    if target.secret and not destination.private:
        reporter.line(f"{target.repo_id} is kept private, since {target.secret}; --public publishes it.")


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
    # Before any request: no link leaves the folder. A path alone could be the name of a demo.
    snapshot = resolve(str(folder.absolute()), compose=True)
    api, target_len = _api(), manifest.calibration.target_len if manifest.calibration else None
    with hub_errors(destination.name, PublishError, f"Then go on with: {destination.push_line(folder)}"):
        target = open_target(api, destination, manifest, target_len)
        held = target.repository.files
        # Before the card, which reads the scales.
        proved = _proved_files(snapshot, manifest, reporter)
        present = _card_to_keep(api, target, folder) if target.is_ours else None
        card = make_card(folder, manifest, source_card=None, repo_id=target.repo_id, present=present)
        for warning in card.warnings:
            reporter.warn(warning)
        _check_metadata(card.text)
        files = _local_files(snapshot.folder, card, proved)
        with reporter.task("Comparing with the Hub (files)", len(files)) as task:
            unchanged, uploads = [], []
            for file in files:
                if _is_there(file, held):
                    unchanged.append(file.path)
                else:
                    uploads.append(file)
                task.advance()
        goal = f" for {format_length(target_len)} tokens" if target_len else ""
        return PushPlan(
            folder=folder,
            destination=destination,
            target=target,
            card=card,
            message=destination.commit_message or f"{manifest.source.name} with its spectrum scaled{goal}",
            uploads=tuple(uploads),
            # Of an earlier push: weights that would be loaded, and this tool's own files.
            deletions=tuple(
                path
                for path in sorted(held.keys() - {file.path for file in files})
                if WEIGHTS.fullmatch(path) or is_own(path)
            ),
            unchanged=tuple(unchanged),
            left_out=snapshot.left_out,
        )


@contextmanager
def scales_alone(folder: Path) -> Iterator[Path]:
    """A temporary folder with a conversion's scales, manifest and pictures, and none of its weights.

    Raises:
        PublishError: the folder is no conversion.
    """
    manifest = Manifest.read(folder)
    if manifest is None or find_scales(folder) is None:
        raise PublishError(f"{folder} holds no scales of this tool.", "Give a folder that mmod-convert wrote.")
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
        return PushResult(f"{api.endpoint}/{plan.repo_id}", None)
    plan.card.write(plan.folder)
    then = f"Then go on with: {plan.destination.push_line(plan.folder, plan.repo_id)}"
    with hub_errors(plan.repo_id, PublishError, then):
        parent = _prepare_repository(api, plan)
        return _commit(api, plan, parent, reporter)


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


def _local_files(folder: Path, card: Card, known: Mapping[str, LocalFile] | None = None) -> list[LocalFile]:
    """What a push holds, in order: the files of a folder that belong to the model, its new card and pictures.

    Args:
        known: the former, where they were hashed before.
    """
    files = dict(_model_files(resolve(str(folder), compose=True)) if known is None else known)
    files |= {picture.path: LocalFile(picture.path, picture.png) for picture in card.pictures}
    files[CARD_NAME] = LocalFile(CARD_NAME, card.text.encode())
    return [files[path] for path in sorted(files)]


def _model_files(snapshot: Snapshot) -> dict[str, LocalFile]:
    paths = {*snapshot.weights, *filter(None, [snapshot.index]), *snapshot.carried, *snapshot.own}
    return {path: LocalFile(path, snapshot.folder / path) for path in paths}


def _is_there(file: LocalFile, held: Mapping[str, RepoFile]) -> bool:
    """Whether the Hub holds a file with the same content; nothing is hashed where the sizes differ."""
    remote = held.get(file.path)
    if remote is None or file.upload_info.size != remote.size:
        return False
    if remote.lfs is not None:
        return file.upload_info.sha256.hex() == remote.lfs.sha256
    with file.as_file() as content:
        return git_hash(content.read()) == remote.blob_id


def _proved_files(snapshot: Snapshot, manifest: Manifest, reporter: Reporter) -> dict[str, LocalFile]:
    """The model's files in a converted folder, compared with the digests of when it was written.

    Raises:
        VerificationError: a file changed, was added or is gone.
    """
    files = _model_files(snapshot)
    sealed_paths = {*manifest.files, *filter(is_sealed, files)}
    with reporter.task("Proving the folder (files)", len(sealed_paths)) as task:
        for path in sorted(sealed_paths):
            said = "is gone" if path not in files else "was added" if path not in manifest.files else ""
            if said or files[path].upload_info.sha256.hex() != manifest.files[path]:
                raise VerificationError(
                    f"{path} {said or 'changed'} since {snapshot.folder} was written.",
                    "Put it right, or convert again. What is pushed is what its manifest says.",
                )
            task.advance()
    return files


# Sending


def _prepare_repository(api: HfApi, plan: PushPlan) -> str | None:
    """Create the repository and the branch where they are missing; returns the commit that the push builds on."""
    repository, parent = plan.target.repository, plan.target.repository.head
    if not repository.exists:
        # None leaves the choice to the organisation's default.
        private = True if plan.target.secret else False if plan.destination.public else None
        api.create_repo(plan.repo_id, private=private)
        parent = api.model_info(plan.repo_id).sha
    revision = plan.destination.revision
    if revision is not None and revision != "main" and not repository.has_branch:
        api.create_branch(plan.repo_id, branch=revision, exist_ok=False)
    return parent


def _commit(api: HfApi, plan: PushPlan, parent: str | None, reporter: Reporter) -> PushResult:
    """Make the commit; one that met a server error or lost its answer is tried again unless it arrived."""

    def send() -> PushResult:
        info = api.create_commit(
            plan.repo_id,
            operations,
            commit_message=plan.message,
            revision=plan.destination.revision,
            parent_commit=parent,
        )
        return PushResult(address, info.oid)

    address = f"{api.endpoint}/{plan.repo_id}"
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *plan.uploads,
        *map(CommitOperationDelete, plan.deletions),
    ]
    for wait in COMMIT_WAITS:
        try:
            return send()
        except HTTPError as error:
            if not _is_failed_commit(error):
                raise
            reporter.warn(f"The commit failed ({redacted_message(error)}); trying again in {wait:.0f} s.")
        time.sleep(wait)
        there = look_at(api, plan.repo_id, plan.destination.revision)
        if there.head not in (None, parent) and all(_is_there(file, there.files) for file in plan.uploads):
            return PushResult(address, there.head)
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
