"""How a run ends: an error becomes a message and an exit code, and what was written has left before the end.

Nothing here needs an installed package, so that the first one that fails to load ends in a message as well.
"""

from __future__ import annotations

import errno
import linecache
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from converter.disk import DISK_FULL
from converter.errors import MmodError, UsageError, redacted_message, system_errors
from converter.interruption import Interrupted, end_on_signals, ignore_signals, interrupt_again
from converter.json_text import json_text
from converter.reporting import printable

_REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "See to the rights of what is named."),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENODEV), "See to the disk or share that it lies on."),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Raise the limit of open files: ulimit -n 4096"),
    errno.ENAMETOOLONG: "Choose a shorter name.",
}
_SHORTAGE = re.compile("out of memory|can't allocate memory|can't start new thread")
_LIBRARY = re.compile(r"site-packages/(\w+)")


def run_application(command: Callable[[], Any]) -> None:
    """Run a typer application; every error becomes a message and an exit code, and a traceback on demand only."""
    threading.excepthook = sys.unraisablehook = _report_in_background
    warnings.showwarning = _report_warning
    if not os.environ.get("COLUMNS", "1").strip("0"):
        # Nothing at all would be shown on a terminal of no width.
        del os.environ["COLUMNS"]
    try:
        end_on_signals()
        code = _flushed(_code_of(command))
        ignore_signals()
    except Interrupted as error:
        code = 128 + error.number
        fix = _notes_of(error)
        _print_error("\n".join(["Interrupted; no incomplete output is left.", *fix]))
        _print_error_json("Interrupted; no incomplete output is left.", "\n".join(fix), code)
        # A library whose import was interrupted may abort while Python takes it down.
        os._exit(_flushed(code))
    sys.exit(code)


def _code_of(command: Callable[[], Any]) -> Any:
    """Run the application; returns the exit code. Raises Interrupted alone, at any time until it returns."""
    try:
        _require_usable_names()
        command()
    except SystemExit as done:
        if done.code == UsageError.exit_code:
            # Typer has written the message to stderr.
            _print_error_json("The command line is wrong.", "See --help.", UsageError.exit_code)
        return done.code
    except Interrupted:
        raise
    except BaseException as error:
        return _explain(error)
    return 0


def _require_usable_names() -> None:
    """Refuse names that no manifest could hold, and a folder that libraries do not load in. Raises UsageError."""
    with system_errors("The current folder is gone", UsageError, "Change to one that is there."):
        os.getcwd()
    for word in sys.argv[1:]:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"{word!r} is no UTF-8, as names in a manifest have to be.",
                "Rename it, or set PYTHONUTF8=1.",
            ) from error


def _explain(error: BaseException) -> int:
    """Print the error and return the exit code."""
    if _is_debugging():
        _print_error("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, BrokenPipeError):
        return 1
    if isinstance(error, MmodError):
        message, fix, code = error.message, error.fix, error.exit_code
    elif isinstance(error, OSError):
        # Errors of the system (permissions, a failing disk) name their file; these two have none.
        message, fix, code = redacted_message(error), _REMEDIES.get(error.errno or 0, ""), 1
        if "temporary directory" in message:
            fix = "Set TMPDIR to a folder that can be written to."
        elif error.errno in DISK_FULL and error.filename is None:
            message = f"What this command prints or writes finds no room: {message}"
            fix = "Free some space where its output goes."
    elif isinstance(error, ImportError) and error.name:
        package = error.name.partition(".")[0]
        message, code = f"{package} does not load: {redacted_message(error)}", 1
        fix = f"Install it again in {sys.prefix}: pip install --force-reinstall {package}"
    elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _SHORTAGE.search(str(error))):
        message, code = f"There is no memory left, or no thread: {redacted_message(error)}", 1
        fix = "End other programs, raise the limits of `ulimit -v` and `ulimit -u`, or choose shorter lengths."
    else:
        message, code = f"{type(error).__name__}: {redacted_message(error)}", 1
        library = _LIBRARY.search(traceback.extract_tb(error.__traceback__)[-1].filename)
        cause = f"{library[1]} failed: see its version and the variables it reads. " if library else ""
        fix = f"{cause}This is a bug. Add --debug to see where it happened, and please report it."
    if suspects := [name for name in dict.fromkeys(_variables_behind(error)) if name not in fix]:
        named = f"The variable {' or '.join(suspects[:3])} may be the cause: correct or unset it."
        fix = f"{fix}\n{named}".strip() if isinstance(error, MmodError) else named
    fix = "\n".join(filter(None, [fix, *_notes_of(error)]))
    _print_error(f"Error: {message}\n{fix}".rstrip())
    _print_error_json(message, fix, code)
    return code


def _variables_behind(error: BaseException | None) -> list[str]:
    """Environment variables that a library's error names or quotes, or that the lines before it read."""
    found: list[str] = []
    while error is not None:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _LIBRARY.search(frame.filename)]
        if frames and not isinstance(error, MmodError):
            words = set(re.findall(r"\w+", " ".join([str(error), *map(_lines_before, frames[-4:])])))
            # An error of encoding does not say what it could not encode.
            quoted = f"{error} '{str(getattr(error, 'object', '')).removeprefix('Bearer ')}'"
            for name, value in os.environ.items():
                # Libraries keep the value of HF_ENDPOINT as ENDPOINT.
                is_quoted = len(value) > 1 and f"'{value}'" in quoted
                # The shell's variable _ is a name in many lines of code.
                is_named = name != "_" and not words.isdisjoint({name, name.removeprefix("HF_")})
                if is_quoted or is_named:
                    found.append(name)
        error = error.__cause__ or error.__context__
    return found


def _lines_before(frame: traceback.FrameSummary) -> str:
    """The statement that failed, and in a function what leads to it."""
    last = frame.lineno or 1
    first = last if frame.name == "<module>" else max(1, last - 10)
    return "".join(linecache.getline(frame.filename, n) for n in range(first, (frame.end_lineno or last) + 1))


def _is_debugging() -> bool:
    return "--debug" in sys.argv or bool(os.environ.get("MMOD_DEBUG"))


def _notes_of(error: BaseException) -> list[str]:
    """Notes on the error: how to go on from what the run has so far."""
    return list(getattr(error, "__notes__", ()))


def _print_error(text: str) -> None:
    # If stderr is closed or full, the exit code must do.
    with suppress(Exception):
        sys.stderr.write(f"{printable(text)}\n")


def _print_error_json(message: str, fix: str, code: int) -> None:
    """The error as the one JSON object on stdout, where that was asked for."""
    if "--json" in sys.argv:
        with suppress(Exception):
            print_text(json_text({"error": message, "fix": fix, "exit_code": code}))


def _report_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    """A library's warning in one line."""
    library = _LIBRARY.search(filename)
    first = next(iter(str(message).strip().splitlines()), category.__name__)
    _print_error(f"Warning: {library[1] if library else category.__name__}: {first}")


def _report_in_background(failed: threading.ExceptHookArgs | sys.UnraisableHookArgs) -> None:
    """Errors in a library's thread or clean-up: shown with --debug only. An interruption is raised once more."""
    if isinstance(failed.exc_value, Interrupted):
        interrupt_again(failed.exc_value.number)
    if failed.exc_value is not None and _is_debugging():
        _print_error("".join(traceback.format_exception(failed.exc_value)).rstrip())


def _flushed(code: Any) -> Any:
    """The exit code, once all output has left: a full disk or a closed pipe shows only then."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except Exception as error:
            # What is left in the buffer must not fail a second time when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                _print_error(f"Error: the result cannot be written: {redacted_message(error)}")
            code = code or int(stream is sys.stdout)
    return code


def print_text(text: str) -> None:
    """Write a result to stdout in its encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
