"""What the Hub's client raises, as errors that say what to do and keep the server's words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from converter.errors import MmodError, PublishError, UsageError, proxy_advice, words_of
from converter.hub_patience import limit_waiting


@contextmanager
def hub_errors(push_line: str | None) -> Iterator[None]:
    """Turn what the client raises within the block into a PublishError that keeps the server's words.

    Args:
        push_line: the command to go on with, where there is a folder to push already.
    """
    limit_waiting()
    try:
        yield
    except HFValidationError as error:
        raise UsageError(
            f"That is no name for a repository: {words_of(error)}", "Give --repo-id OWNER/NAME."
        ) from error
    except MmodError:
        raise
    except Exception as error:
        cause = _root(error)
        message, fix = _explain(cause)
        if push_line is not None:
            fix = f"{fix} Then go on with: {push_line}"
        raise PublishError(f"{message}: {words_of(cause)}", fix) from error


def _root(error: BaseException) -> BaseException:
    """The client's own error, which it wraps where an upload failed."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, (HTTPError, OSError)):
        error = error.__cause__
    return error


def _explain(error: BaseException) -> tuple[str, str]:
    """What happened, and what the user can do about it."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    is_full = status in (402, 413, 507) or (status == 403 and re.search(r"quota|storage", words_of(error).lower()))
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
        (True, "The Hub's client could not go on", proxy_advice()),
    ]
    return next((message, fix) for holds, message, fix in explanations if holds)


def request_path(error: HTTPError) -> str:
    """The path of the request that failed; empty where it was never made."""
    if isinstance(error, HfHubHTTPError):
        return str(error.response.request.url.path)
    try:
        return str(error.request.url.path)
    except RuntimeError:
        return ""
