"""The Hub's client: how long it may wait for an answer, and what it raises as errors that say what to do."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from converter.errors import MmodError, proxy_advice, redacted_message

ANSWER_SECONDS = 20.0
"""For requests that only read. Each piece of an answer or file restarts the time."""
WORK_SECONDS = 120.0
"""For commits and uploads."""


@functools.cache
def limit_waiting() -> None:
    """Give every request of the client a time limit if it has none."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def limited() -> Any:
        client = default_client_factory()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "request": [*hooks["request"], _limit]}
        return client

    set_client_factory(limited)


def _limit(request: Any) -> None:
    limit = ANSWER_SECONDS if request.method in ("GET", "HEAD") else WORK_SECONDS
    limits = request.extensions.get("timeout") or {}
    steps = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {step: limits.get(step) or limit for step in steps}


@contextmanager
def hub_errors(what: str, kind: type[MmodError], then: str = "", noun: str = "model") -> Iterator[None]:
    """Turn what the client raises within the block into an error of ours that keeps the server's words.

    Args:
        what: the model or repository that it is about.
        then: a sentence on how to go on afterwards.
        noun: what kind of repository it is.
    """
    limit_waiting()
    try:
        yield
    except MmodError:
        raise
    except Exception as error:
        cause = _root(error)
        message, fix = _explain(cause, what, noun)
        raise kind(f"{message}: {redacted_message(cause)}", f"{fix} {then}".rstrip()) from error


def _root(error: BaseException) -> BaseException:
    """The client's own error, which it wraps where an upload failed."""
    from huggingface_hub.errors import HTTPError

    while isinstance(error, RuntimeError) and isinstance(error.__cause__, (HTTPError, OSError)):
        error = error.__cause__
    return error


def _explain(error: BaseException, what: str, noun: str) -> tuple[str, str]:
    """What happened, and what the user can do about it: the first row that fits."""
    from huggingface_hub import errors

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    is_full = status in (402, 413, 507) or (
        status == 403 and re.search(r"quota|storage", redacted_message(error).lower())
    )
    log_in = "Run `hf auth login`, or set HF_TOKEN."
    rows: list[tuple[type[Exception] | bool, str, str]] = [
        (errors.LocalTokenNotFoundError, "You are not logged in", log_in),
        (errors.HFValidationError, f"{what} is no name that the Hub takes", "Write OWNER/NAME."),
        (errors.GatedRepoError, f"{what} is gated", f"Accept its terms on its page on the Hub. {log_in}"),
        (
            errors.RepositoryNotFoundError,
            f"There is no {noun} {what} on the Hub that you can see",
            f"Check the spelling. For a private one: {log_in}",
        ),
        (errors.RevisionNotFoundError, f"{what} has no such revision", "Check --revision."),
        (
            errors.LocalEntryNotFoundError,
            f"{what} is not in the local cache and the Hub cannot be reached",
            "Check the network (or unset HF_HUB_OFFLINE), or give a local folder.",
        ),
        (
            errors.OfflineModeIsEnabled,
            f"The Hub client is in offline mode, and {what} is not in the local cache",
            "Unset HF_HUB_OFFLINE, or give a local folder.",
        ),
        (bool(is_full), "There is no room for this on the Hub", "Free some, or choose another --repo-id."),
        (status == 401, "The Hub does not take your token", log_in),
        (
            status == 403,
            f"The Hub refused a request for {what}",
            "Use a token with write access for a push (hf auth login), or choose another --repo-id.",
        ),
        (status == 409, "The name is taken", "Choose another --repo-id."),
        (status == 412, "Someone changed the repository, so nothing was written", "Look at the change on the Hub."),
        (status == 429, "The Hub asks for fewer requests", "Wait a while."),
        (status >= 500, "The Hub failed, and retries did not help", "Wait a while."),
        (status > 0, f"The Hub refused a request for {what}", ""),
        (
            errors.HTTPError,
            f"The Hub cannot be reached for {what}",
            f"{proxy_advice()} HF_HUB_OFFLINE=1 uses what the local cache holds.",
        ),
        (OSError, f"The files of {what} cannot be read or sent", "Check the network and the room on the disk."),
        (True, f"The Hub's client failed for {what}", proxy_advice()),
    ]
    return next(
        (message, fix)
        for fits, message, fix in rows
        if (fits if isinstance(fits, bool) else isinstance(error, fits))
    )
