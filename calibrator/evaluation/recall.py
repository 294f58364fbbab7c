"""Recall: what of a text a model still finds, by length of the text and distance of the fact from its end.

A prompt is a filler text with one fact in it and a question at its end. Answers are read from one forward pass by
teacher forcing: an answer is found where every one of its tokens is the most likely one after those before it,
which is what greedy decoding would write. A long filler before the fact runs once for a few prompts, each of which
goes on from there with its own fact, its own filler and its own question.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from calibrator.carried_state import State
from calibrator.facts import KINDS, Fact, FactSource
from calibrator.model import StockModel
from converter.reporting import Reporter

# Prompts that share the filler before their facts, and how long it must be to be worth it.
GROUP = 4
SHORTEST_SHARED = 1024


@dataclass(frozen=True)
class Cell:
    """Facts of one kind at one length and distance.

    Attributes:
        length: tokens of the prompt. distance: tokens between the fact and the prompt's end.
        right: (samples,) float64: share of the answer's tokens that were found; 1 where the whole answer was.
        nats: (samples,) float64: mean loss of the answer's tokens.
    """

    kind: str
    length: int
    distance: int
    right: Tensor
    nats: Tensor

    @property
    def found(self) -> Tensor:
        """(samples,) bool: whether the whole answer was found."""
        return self.right == 1

    @property
    def rate(self) -> float:
        """Share of the facts found."""
        return float(self.found.double().mean())

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's interval of the rate; 95 % with the default ``z``."""
        n, p = len(self.found), self.rate
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
        return max(0.0, low), min(1.0, high)

    def record(self) -> dict[str, object]:
        """The cell as a JSON object."""
        low, high = self.interval()
        return {
            "kind": self.kind,
            "is_span": KINDS[self.kind].is_span,
            "length": self.length,
            "distance": self.distance,
            "samples": len(self.found),
            "found": int(self.found.sum()),
            "low": round(low, 4),
            "high": round(high, 4),
            "tokens": round(float(self.right.mean()), 4),
            "nats": round(float(self.nats.mean()), 4),
        }


class Answers(NamedTuple):
    """What a model says where the answers of some prompts stand.

    Attributes:
        right: (facts,) float64: share of each answer's tokens that were found.
        nats: (facts,) float64: mean loss of each answer's tokens.
        entropy: (facts,) float64: nats, of the prediction of each answer's first token.
    """

    right: Tensor
    nats: Tensor
    entropy: Tensor


Reader = Callable[[StockModel, Tensor, int, Sequence[Fact], int], Answers]
"""Reads the answers of prompts otherwise than whole: model, (facts, length) token ids, where the answers start, the
facts, and the tokens of the announcement that each prompt starts with."""


@torch.no_grad()
def measure_recall(
    stock: StockModel,
    source: FactSource,
    kinds: Iterable[str],
    cells: Mapping[int, Sequence[int]],
    samples: int | Mapping[int, int],
    seed: int,
    reporter: Reporter,
    what: str,
    reader: Reader | None = None,
) -> list[Cell]:
    """Ask for facts at every length and distance.

    Args:
        source: facts and filler are drawn from its text.
        cells: length to the distances asked at; those that a fact does not fit beside are left out.
        samples: prompts a cell, or length to that.
        seed: of the draws; a cell's facts depend on it, the kind, the length and the distance alone.
        reader: how the model is shown a prompt; whole by default.
    """
    found: list[Cell] = []
    kinds = list(kinds)
    total = sum(len(distances) for distances in cells.values()) * len(kinds)
    with reporter.task(f"Recall of {what}", total) as task:
        for kind in kinds:
            for length, distances in cells.items():
                count = samples if isinstance(samples, int) else samples[length]
                groups = []
                for start in range(0, count, GROUP):
                    size = min(GROUP, count - start)
                    words = f"{seed} {kind} {length} {start}"
                    groups.append(_ask_group(stock, source, kind, length, distances, size, words, reader))
                    task.describe(f"Recall of {what}: {kind}, {length} tokens")
                for distance in [d for d in groups[0] if all(d in group for group in groups)]:
                    parts = [group[distance] for group in groups]
                    right, nats, _ = map(torch.cat, zip(*parts, strict=True))
                    found.append(Cell(kind, length, distance, right, nats))
                task.advance(len(distances))
    return found


def _ask_group(
    stock: StockModel,
    source: FactSource,
    kind: str,
    length: int,
    distances: Sequence[int],
    size: int,
    seed: str,
    reader: Reader | None,
) -> dict[int, Answers]:
    """Answers of ``size`` prompts at each distance, all with the same filler before the fact."""
    answers: dict[int, Answers] = {}
    state: State | None = None
    done = 0
    filler = torch.cat([source.opening(kind), source.filler(length, seeded(seed))])[:length]
    for distance in sorted(distances, reverse=True):
        generator = seeded(f"{seed} {distance}")
        facts = [source.draw(kind, generator) for _ in range(size)]
        start = length - distance - max(len(fact.text) for fact in facts)
        if start < len(source.opening(kind)) or distance < max(len(fact.question) for fact in facts):
            continue
        between = [source.filler(distance - len(fact.question), generator) for fact in facts]
        # Every prompt ends at ``length``; behind it stand the answers, and zeros that no answer depends on.
        rows = pad_sequence(
            [
                torch.cat(
                    [filler[start : length - distance - len(fact.text)], fact.text, own, fact.question, fact.answer]
                )
                for fact, own in zip(facts, between, strict=True)
            ],
            batch_first=True,
        )
        if reader is None and start > SHORTEST_SHARED:
            state, _ = carry(stock, filler[None, done:start], state)
            done = start
            answers[distance] = read_answers(stock, rows, length - start, facts, state.repeated(size))
        else:
            opening = source.opening(kind)
            before = [torch.cat([opening, source.filler(start - len(opening), generator)]) for _ in facts]
            whole = torch.cat([torch.stack(before), rows], dim=1)
            asked = stock, whole, length, facts
            answers[distance] = reader(*asked, len(opening)) if reader else read_answers(*asked)
    return answers


@torch.no_grad()
def carry(stock: StockModel, tokens: Tensor, state: State | None = None, keep: int = 0) -> tuple[State, Tensor]:
    """Carry a state through texts.

    Args:
        tokens: (texts, length) token ids.
        state: where they go on from; None for zero state.

    Returns:
        The state at the end, and the hidden states of the last ``keep`` tokens, (texts, keep, hidden_size).
    """
    end, kept = state or State(), list[Tensor]()
    step = stock.tokens_of_piece(len(tokens), end.attention.position + tokens.shape[1])
    for hidden, after in stock.in_pieces(tokens, step, state):
        end, kept = after, [*kept, hidden][-(1 + keep // step) - 1 :]
    return end, torch.cat(kept, dim=1)[:, -keep:] if keep else torch.empty(0)


def read_answers(
    stock: StockModel, rows: Tensor, prompt: int, facts: Sequence[Fact], state: State | None = None
) -> Answers:
    """Read the answers that follow prompts of one length.

    Args:
        rows: (facts, length) token ids; each answer starts at ``prompt``.
        state: where the rows go on from; None for zero state.
    """
    asked = rows.shape[1] - prompt
    _, hidden = carry(stock, rows[:, :-1], state, keep=asked)
    scores = stock.logits(hidden).log_softmax(-1)
    targets = rows[:, prompt:].to(scores.device)
    is_answer = torch.arange(asked) < torch.tensor([[len(fact.answer)] for fact in facts])
    is_answer = is_answer.to(scores.device)
    losses = -scores.gather(-1, targets[..., None]).squeeze(-1)
    hits = (scores.argmax(-1) == targets) & is_answer
    asked_tokens = is_answer.sum(1)
    right, nats = hits.sum(1) / asked_tokens, (losses * is_answer).sum(1) / asked_tokens
    first = scores[:, 0]
    return Answers(*(values.double().cpu() for values in (right, nats, -(first.exp() * first).sum(-1))))


@torch.no_grad()
def continue_greedily(stock: StockModel, prompt: Tensor, count: int) -> Tensor:
    """The most likely next tokens, one after the other.

    Args:
        prompt: (length,) token ids.

    Returns:
        (count,) token ids.
    """
    said: list[int] = []
    state, hidden = carry(stock, prompt[None], keep=1)
    while len(said) < count:
        said.append(int(stock.logits(hidden)[0, -1].argmax()))
        state, hidden = carry(stock, torch.tensor([said[-1:]]), state, keep=1)
    return torch.tensor(said)


def seeded(words: str) -> torch.Generator:
    """A random generator whose draws depend on some words alone, on every machine."""
    digest = hashlib.sha256(words.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
