"""The output folder: written as a staging directory beside it, renamed when it is complete.

Whatever interrupts a run, the output either does not exist or is complete. ``.NAME.mmod-partial`` lies beside it
while a run writes or after it was killed, and ``.NAME.mmod-lock``, held by a running process. The next run on the
same output cleans up after a killed one.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converter.checkpoint_files import in_short
from converter.digests import is_sealed, sha256_of
from converter.disk import DISK_FULL, full_disk_named, named
from converter.errors import LayoutError, OutputError, system_errors
from converter.interruption import undisturbed
from converter.lengths import format_length
from converter.manifest import MANIFEST_NAME, Manifest
from converter.reporting import SILENT, Reporter
from converter.temporary import Held, lock

_QUICKLY_READ = 1 << 24
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}


def converted_name(source_name: str, target_len: int | None, ending: str = "hf") -> str:
    """The default name of a converted model: ``mamba2-2.7b`` for 32k is ``mamba2-2.7b-32k-hf``.

    Args:
        target_len: tokens the scales were calibrated for; None if they were given or need no text.
        ending: what the name says of the layout.
    """
    name = re.sub(r"[^\w.-]+", "-", source_name.split("/")[-1]).strip("-.")
    name = re.sub(r"([-_]hf|(-\d{5}-of-\d{5})?\.gguf|[-_]gguf)$", "", name, flags=re.IGNORECASE)
    return f"{name}-{format_length(target_len) if target_len else 'scaled'}-{ending}"


def check_output(output: Path, overwrite: bool, source: Path | None = None) -> None:
    """Refuse, before anything slow, an output that could not be put in place at the end.

    Args:
        overwrite: an existing conversion may be replaced.
        source: folder or file of the source, which the output must neither be nor lie in nor contain.

    Raises:
        OutputError: it exists, lies in the source, or cannot be written.
    """
    output = output.absolute()
    if source is not None:
        real, source = output.parent.resolve() / output.name, source.resolve()
        if _lies_in(real, source) or _lies_in(source, real):
            raise OutputError(f"{output} and the source {source} lie in one another.", "Choose a folder elsewhere.")
    if not output.parent.is_dir():
        raise OutputError(f"The folder {output.parent} does not exist.", f"Create it: mkdir -p {output.parent}")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise OutputError(f"The folder {output.parent} cannot be written to.", "Choose another folder.")
    if Path.cwd().is_relative_to(output.resolve()):
        raise OutputError(f"{output} is where you are; it would be gone afterwards.", "Choose another name.")
    _check_place(output, overwrite)


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or below it, by whatever name: some file systems do not tell capitals apart."""
    return folder.exists() and any(parent.exists() and parent.samefile(folder) for parent in (path, *path.parents))


def _check_place(output: Path, overwrite: bool) -> None:
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not output.is_dir():
        what = "a link" if output.is_symlink() else "no folder"
        raise OutputError(f"{output} exists and is {what}.", "Choose another name.")
    try:
        names = os.listdir(output)
    except FileNotFoundError:
        # Another run is putting its result in place; the check is repeated once the lock is held.
        return
    if not names:
        return
    if MANIFEST_NAME not in names:
        raise OutputError(
            f"{output} exists and is no conversion of this tool ({MANIFEST_NAME} is missing).",
            "Choose another name.",
        )
    if not overwrite:
        raise OutputError(f"{output} exists already.", "Choose another name, or add --overwrite to replace it.")
    if lost := _work_of_others(output):
        raise OutputError(
            f"{output} holds what this tool did not write: {in_short(lost)}.",
            "Move that elsewhere, or choose another name.",
        )


def _work_of_others(output: Path) -> list[str]:
    """Files of a conversion that were added or changed since; the card is not among them, whose text is kept."""
    try:
        manifest = Manifest.read(output)
        written = manifest.files if manifest else {}
        paths = [path for path in output.rglob("*") if path.is_file()] if written else []
        names = {path.relative_to(output).as_posix(): path for path in paths}
        return [
            name
            for name, path in names.items()
            if is_sealed(name)
            and (name not in written or (path.stat().st_size < _QUICKLY_READ and sha256_of(path) != written[name]))
        ]
    except (LayoutError, OSError):
        # An unreadable conversion is replaced; one that another run is replacing is looked at again after it.
        return []


@contextmanager
def staged(
    output: Path, overwrite: bool, source: Path | None = None, reporter: Reporter = SILENT
) -> Iterator[Path]:
    """A new empty folder beside ``output`` that takes its name when the block ends without an exception.

    Everything in it is on the disk before the rename. On any exception, Ctrl-C included, nothing stays.

    Args:
        reporter: told what the file system cannot do, and what is not protected then.

    Raises:
        OutputError: as :func:`check_output`, another run is writing this output, or the disk is full.
    """
    check_output(output, overwrite, source)
    output = output.absolute()
    partial = output.with_name(f".{output.name}.mmod-partial")
    replaced = output.with_name(f".{output.name}.mmod-replaced")
    probe = output.with_name(f".{output.name}.mmod-probe")
    try:
        with full_disk_named(output.parent), lock(output.with_name(f".{output.name}.mmod-lock"), reporter):
            _clean(output, partial, replaced, probe)
            # The output may have come into being while another run held the lock.
            check_output(output, overwrite, source)
            try:
                _make(partial, probe)
                yield partial
                _flush_all(partial)
                with undisturbed():
                    _put_in_place(partial, output, replaced, overwrite)
                    _flush(output.parent)
            finally:
                with undisturbed():
                    _clean(output, partial, replaced, probe)
    except Held as error:
        raise OutputError(
            f"Another run is writing {output}.", "Wait for it to end, or choose another name."
        ) from error


def _make(partial: Path, probe: Path) -> None:
    """Make the staging directory by the rename that the run ends with, so that what forbids it is known at once.

    Raises:
        OutputError: the file system does.
    """
    probe.mkdir()
    fix = "Choose a folder on another file system, and move the result by hand."
    with system_errors(f"A folder in {partial.parent} cannot be renamed", OutputError, fix):
        os.rename(probe, partial)


def _put_in_place(partial: Path, output: Path, replaced: Path, overwrite: bool) -> None:
    """Rename; whatever appeared there in the meantime is left as it is.

    Raises:
        OutputError: something did that may not be replaced.
    """
    if overwrite and os.path.lexists(output):
        os.rename(output, replaced)
        try:
            _check_place(replaced, overwrite)
        except OutputError as error:
            raise OutputError(
                f"{output} is another folder than when this began, and was left alone.", "Choose another name."
            ) from error
    try:
        os.rename(partial, output)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        raise OutputError(
            f"{output} came into being while this ran, and was left alone.", "Choose another name."
        ) from error


def _clean(output: Path, partial: Path, replaced: Path, probe: Path) -> None:
    """Remove what a run left; a folder that was moved aside is restored unless its successor is in place."""
    if os.path.lexists(replaced) and not os.path.lexists(output):
        os.rename(replaced, output)
    for leftover in (partial, replaced, probe):
        if leftover.exists():
            # A read-only folder can be moved aside, but not emptied.
            for parent, _, _ in os.walk(leftover):
                os.chmod(parent, 0o700)
            shutil.rmtree(leftover)


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's table of names, is on the disk, where that can be had."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with named(path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in DISK_FULL | {errno.EIO}:
            raise


def _flush_all(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _flush(Path(parent, name))
        _flush(Path(parent))
