"""How much a method will run: counted in tokens, from which time and memory are estimated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Tokens that pass through the model.

    Attributes:
        judgements: how often validation runs, beside the once for the unscaled model.
        forward: tokens of forward passes alone.
        backward: tokens of forward passes with the backward pass after them.
        together: the most tokens whose activations a backward pass needs at once.
        checkpointed: whether layers keep their input only and run again in the backward pass.
    """

    judgements: int = 0
    forward: int = 0
    backward: int = 0
    together: int = 0
    checkpointed: bool = False
