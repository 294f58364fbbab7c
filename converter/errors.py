"""The errors a user can meet: each says what is wrong and how to put it right."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager


class MmodError(Exception):
    """Base of every error that the command line shows without a traceback.

    Args:
        message: what is wrong, in one sentence.
        fix: what the user can do about it; that of the class where this is empty.
    """

    exit_code = 1
    remedy = ""

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix or self.remedy


class UsageError(MmodError):
    """An option or argument has a value that cannot be used."""

    exit_code = 2


class SourceError(MmodError):
    """The model named cannot be found, read or resolved to a commit."""


class LayoutError(MmodError):
    """The checkpoint is readable but is no model that can be scaled, or uses a feature that cannot be written."""

    remedy = "The checkpoint is incomplete, or config.json belongs to another."


class ManifestError(LayoutError):
    """mmod.json cannot be read, or is of another version."""

    remedy = "Get mmod.json again from where the copy came from, or convert again."


class CorruptCheckpointError(MmodError):
    """A file of the checkpoint breaks its own format."""

    remedy = "Download or copy the checkpoint again."


class TextError(MmodError):
    """The text to calibrate or evaluate on is missing, unreadable or too short."""


class OutputError(MmodError):
    """The output exists already, is being written by another run, or does not fit on the disk."""


class CalibrationError(MmodError):
    """The model cannot be run or calibrated on this machine."""


class VerificationError(MmodError):
    """A converted checkpoint is not what its manifest says."""

    remedy = "Convert again, or compare with the base and revision that the manifest names."


class PublishError(MmodError):
    """The Hub refused or could not finish a request; the converted folder is complete all the same."""


class JobError(MmodError):
    """A job on the Hub could not be started, or ended without a result."""


LONGEST = 600
"""Characters of a library's error that are shown; torch lists all that it knows."""


def redacted_message(error: BaseException) -> str:
    """A library's error in one line, without secrets: queries of links, passwords and tokens are removed.

    For an error of the Hub's client it is the server's message, if there is one.
    """
    text = getattr(error, "server_message", None) or str(error).strip() or repr(error)
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", " ".join(text.split()))
    text = re.sub(r"(\w+://)[^\s/@'\"]+@", r"\1", text)
    text = re.sub(r"\bhf_\w+", "hf_...", text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


@contextmanager
def boundary(what: str, kind: type[MmodError], fix: str = "") -> Iterator[None]:
    """Turn any exception of a library within the block into an error of ours. Our own errors pass.

    Args:
        what: the start of the message, without a full stop; the library's message follows.
    """
    try:
        yield
    except MmodError:
        raise
    except Exception as error:
        raise kind(f"{what}: {redacted_message(error)}", fix) from error


@contextmanager
def system_errors(what: str, kind: type[MmodError], fix: str) -> Iterator[None]:
    """Turn an error of the system within the block into one of ours: ``what``, and the system's reason."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror}.", fix) from error


def proxy_advice() -> str:
    """Advice for a Hub that cannot be reached: often it is what the environment names."""
    names = [name for name in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY") for name in (name, name.lower())]
    named = ", ".join(name for name in names if os.environ.get(name))
    if not named:
        what = "the network and the variable HF_ENDPOINT" if os.environ.get("HF_ENDPOINT") else "the network"
        return f"Check {what}, or give a local folder or file."
    return f"The proxy is from {named}: unset it, or for a SOCKS proxy write socks5:// and pip install socksio."
