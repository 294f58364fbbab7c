"""How long the Hub's client waits for an answer: by itself it would wait for good where a server says nothing."""

from __future__ import annotations

import functools
from typing import Any

ANSWER_SECONDS = 20.0
"""For what is only asked. Any piece of an answer, or of a file, starts the time anew."""
WORK_SECONDS = 120.0
"""For what makes the server work: a commit, or a file that was sent."""


@functools.cache
def limit_waiting() -> None:
    """Give every request of the client, whoever makes it, a limit where it has none."""
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
