"""Chooses on validation text how far rotary positions are extended, before the factors of A are calibrated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from calibrator.calibration import Problem
from calibrator.methods.floor import start_floor
from calibrator.validation import Candidate

# Nats of the objective; every factor costs short text something, so that the smaller one is taken.
TIE = 0.01


def choose_extension(problem: Problem, choices: Mapping[str, Mapping[str, Any]]) -> tuple[str | None, str]:
    """Extend the positions of the model by the smallest factor whose validation objective ties with the lowest.

    A stays on the spectral floor meanwhile where validation prefers that to s = 1: beside states that fail, all
    choices look alike.

    Args:
        choices: words for an extension to its entry of config.json, from the smallest factor on.

    Returns:
        The words of the choice, None where the positions had better stay, and a sentence on all of them.
    """
    stock, scaling, validation = problem.stock, problem.scaling, problem.validation
    task = problem.reporter.task("Choosing how far positions are extended", len(choices) + 2)
    with scaling, stock.recurrence, task as progress:
        problem.skills.begin()
        validation.begin(problem.skills.far_nats)
        progress.advance()
        if (floor := start_floor(problem)) is not None:
            scaling.load(floor)
            if not validation.judge(0).objective < 0:
                scaling.load(validation.unscaled.scales)
        progress.advance()
        found: dict[str | None, Candidate] = {None: min(validation.candidates, key=lambda c: c.objective)}
        for words, entry in choices.items():
            stock.extend_positions(entry)
            found[words] = validation.judge(0)
            progress.advance()
        best = min(candidate.objective for candidate in found.values())
        chosen = next(words for words, candidate in found.items() if candidate.objective <= best + TIE)
        stock.extend_positions(choices[chosen] if chosen else {})
    told = [
        f"{words} {found[words].objective - found[None].objective:+.2f} nats, up to {problem.settings.train_len} "
        f"tokens {math.expm1(found[words].short_change):+.1%} of perplexity"
        for words in choices
    ]
    return chosen, (
        "Validation text over all lengths, against the positions as they are: "
        f"{'; '.join(told)}. {f'So it is {chosen}' if chosen else 'So they stay'}."
    )
