"""Options that a method does not have, or not together, are refused by name."""

from __future__ import annotations

from typing import get_args

import pytest

from calibrator.methods import METHODS, find_method
from converter.commands.requests import MethodName
from converter.errors import UsageError


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("newton", [], "There is no method 'newton'"),
        ("constant", ["lr"], "--method constant has no --lr"),
        ("spsa", ["steps", "streams"], "--method spsa has no --streams"),
    ],
)
def test_refused(method: str, given: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        find_method(method, given)


def test_options_that_go_together_are_taken() -> None:
    assert find_method("spsa", ["steps", "probes", "preset"]) is METHODS["spsa"]
    assert find_method("gradient", ["steps", "streams"]) is METHODS["gradient"]


def test_every_method_can_be_chosen_on_the_command_line() -> None:
    assert get_args(MethodName) == tuple(METHODS)
