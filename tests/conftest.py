"""Fixtures that several test files share."""

import signal
from collections.abc import Iterator

import pytest

from tests.hub_server import hub

__all__ = ["hub"]


@pytest.fixture(scope="session", autouse=True)
def _heeded_sigint() -> Iterator[None]:
    """A shell's background jobs ignore SIGINT from the start, and so would the programs that tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
