"""The errors a user can meet: each says what is wrong and how to put it right."""

from __future__ import annotations

import re


class MmodError(Exception):
    """Base of every error that the command line shows without a traceback.

    Args:
        message: what is wrong, in one sentence.
        fix: what the user can do about it; empty when nothing can be done.
    """

    exit_code = 1

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix


class UsageError(MmodError):
    """An option or argument has a value that cannot be used."""

    exit_code = 2


class SourceError(MmodError):
    """The model named cannot be found, read or resolved to a commit."""


class LayoutError(MmodError):
    """The checkpoint is readable but is no model that can be scaled, or uses a feature that cannot be written."""


class CorruptCheckpointError(MmodError):
    """A file of the checkpoint breaks its own format."""


class TextError(MmodError):
    """The text to calibrate or evaluate on is missing, unreadable or too short."""


class OutputError(MmodError):
    """The output exists already, is being written by another run, or does not fit on the disk."""


class CalibrationError(MmodError):
    """The model cannot be run or calibrated on this machine."""


class VerificationError(MmodError):
    """A converted checkpoint is not what its manifest says."""


class PublishError(MmodError):
    """The Hub refused or could not finish a request; the converted folder is complete all the same."""


def words_of(error: BaseException) -> str:
    """What a library's error says, in one line, without what opens doors: signed links' queries and tokens.

    Of an error of the Hub's client it is what the server said, where it said something.
    """
    text = getattr(error, "server_message", None) or str(error).strip() or repr(error)
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", " ".join(text.split()))
    return re.sub(r"\bhf_\w+", "hf_...", text)
