"""Fixtures that several test files share."""

from tests.hub_server import hub

__all__ = ["hub"]
