"""Facts that a text can hold and be asked for: copied spans, key-value pairs by name, the paper's pass key.

The same facts are planted in the calibration text, judged by the guard, and measured by ``evaluate`` and
``diagnose``. Copied spans need no language and no template: a span stands in the text, and where its first tokens
stand again the others are expected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

NAMES = (
    *("Alice", "Brian", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "James", "Karen", "Louis"),
    *("Maria", "Nancy", "Oscar", "Peter", "Quentin", "Rachel", "Simon", "Teresa", "Ursula", "Victor", "Wendy"),
    *("Xavier", "Yvonne", "Zachary", "Arthur", "Betty", "Charles", "Diana", "Edward", "Fiona"),
)
OPENING = "A pass key is hidden in the text below. Find it and remember it."
# Attempts to find a free place for a fact before it is left out.
TRIES = 4


@dataclass(frozen=True)
class Fact:
    """What stands in a text, and what is asked later.

    Attributes:
        text: token ids of the fact.
        question: token ids that stand before the answer.
        answer: token ids that are expected; never empty.
    """

    text: Tensor
    question: Tensor
    answer: Tensor

    @property
    def asking(self) -> int:
        """Tokens of question and answer."""
        return len(self.question) + len(self.answer)


@dataclass(frozen=True)
class Kind:
    """One kind of fact.

    Attributes:
        draw: makes a fact from a source and a random generator; the flag asks for spans of varied size.
        opening: text at the start of a prompt that announces it.
        is_span: a copied span, which needs no language.
    """

    draw: Callable[[FactSource, torch.Generator, bool], Fact]
    opening: str = ""
    is_span: bool = False


class FactSource:
    """Draws facts in the tokens of one text.

    Args:
        documents: token ids; spans of the text are taken from them, and random spans from the tokens they use.
        tokenizer: a transformers tokenizer; None for copied spans only.
    """

    def __init__(self, documents: Sequence[Tensor], tokenizer: Any = None) -> None:
        self.documents = sorted(documents, key=len, reverse=True)[:64]
        special = torch.tensor(getattr(tokenizer, "all_special_ids", []), dtype=torch.int64)
        used = torch.cat(list(self.documents)).unique()
        self.vocabulary = used[~torch.isin(used, special)]
        self._tokenizer = tokenizer

    @property
    def kinds(self) -> list[str]:
        """The kinds that can be drawn."""
        return [name for name, kind in KINDS.items() if kind.is_span or self._tokenizer is not None]

    def encode(self, text: str, after: str = ".") -> Tensor:
        """Tokens of a piece of text as they are after another, whose own tokens are left out."""
        before, whole = (
            self._tokenizer(part, add_special_tokens=False).input_ids for part in (after, after + text)
        )
        same = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        return torch.tensor(whole[same:], dtype=torch.int64)

    def opening(self, kind: str) -> Tensor:
        """What a prompt starts with: the tokenizer's own first tokens and the kind's announcement."""
        if self._tokenizer is None:
            return torch.empty(0, dtype=torch.int64)
        return torch.tensor(self._tokenizer(KINDS[kind].opening).input_ids, dtype=torch.int64)

    def draw(self, kind: str, generator: torch.Generator, *, varied: bool = False) -> Fact:
        """A fact of a kind; ``varied`` draws the size of copied spans as well."""
        return KINDS[kind].draw(self, generator, varied)

    def random_tokens(self, count: int, generator: torch.Generator) -> Tensor:
        """Tokens of the text in no order: (count,)."""
        return self.vocabulary[torch.randint(len(self.vocabulary), (count,), generator=generator)]

    def filler(self, count: int, generator: torch.Generator) -> Tensor:
        """Text from a random place on, which starts over at the end of a document: (count,)."""
        document = self.documents[0]
        start = randint(0, len(document) - 1, generator)
        return document.roll(-start).repeat(-(-count // len(document)))[:count]

    def slice(self, count: int, generator: torch.Generator) -> Tensor:
        """Consecutive tokens of a random place: (count,), fewer where every document is shorter."""
        rooms = torch.tensor(
            [max(1, len(document) - count + 1) for document in self.documents], dtype=torch.float64
        )
        document = self.documents[int(torch.multinomial(rooms, 1, generator=generator))]
        start = randint(0, max(0, len(document) - count), generator)
        return document[start : start + count]


def randint(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number from ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _random_span(source: FactSource, generator: torch.Generator, varied: bool) -> Fact:
    size, cue = (randint(6, 20, generator), 2) if varied else (16, 3)
    span = source.random_tokens(size, generator)
    return Fact(span, span[:cue], span[cue:])


def _slice(source: FactSource, generator: torch.Generator, varied: bool) -> Fact:
    span = source.slice(randint(12, 40, generator) if varied else 24, generator)
    return Fact(span, span[:4], span[4:])


def _fact(source: FactSource, text: str, question: str, answer: str) -> Fact:
    return Fact(source.encode(text), source.encode(question), source.encode(answer, after=question))


def _number(generator: torch.Generator) -> int:
    return randint(10_000, 99_999, generator)


def _pass_key(source: FactSource, generator: torch.Generator, _varied: bool) -> Fact:
    key = _number(generator)
    text = f" The pass key is {key}. Remember it. {key} is the pass key."
    return _fact(source, text, " Answer:", f" {key}")


def _pairs(count: int, source: FactSource, generator: torch.Generator, _varied: bool) -> Fact:
    names = [NAMES[index] for index in torch.randperm(len(NAMES), generator=generator)[:count].tolist()]
    codes = [_number(generator) for _ in names]
    asked = randint(0, count - 1, generator)
    text = "".join(f" The code for {name} is {code}." for name, code in zip(names, codes, strict=True))
    question = f" What is the code for {names[asked]}? The code for {names[asked]} is"
    return _fact(source, text, question, f" {codes[asked]}")


KINDS: Mapping[str, Kind] = {
    "random span": Kind(_random_span, is_span=True),
    "slice": Kind(_slice, is_span=True),
    "pass key": Kind(_pass_key, OPENING),
    "1 pair": Kind(partial(_pairs, 1)),
    "4 pairs": Kind(partial(_pairs, 4)),
    "16 pairs": Kind(partial(_pairs, 16)),
}


def plant(
    tokens: Tensor,
    source: FactSource,
    kinds: Sequence[str],
    generator: torch.Generator,
    *,
    every: int,
    farthest: int,
    nearest: int,
) -> tuple[Tensor, Tensor]:
    """Write facts and their questions over a text.

    Args:
        tokens: (length,) token ids; not changed.
        kinds: drawn from with equal odds.
        every: one fact in so many tokens.
        nearest, farthest: tokens between a fact and its question, drawn log-uniformly.

    Returns:
        The text with facts, and which of its tokens are answers: (length,) bool.
    """
    tokens, answers = tokens.clone(), torch.zeros(len(tokens), dtype=torch.bool)
    taken = torch.zeros(len(tokens), dtype=torch.bool)
    # Of two facts with one question the later one answers it, so their places must not overlap.
    asked_before: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    drawn = []
    for _ in range(max(1, len(tokens) // every)):
        fact = source.draw(kinds[randint(0, len(kinds) - 1, generator)], generator, varied=True)
        most = min(farthest, len(tokens) - len(fact.text) - fact.asking)
        if most >= nearest:
            share = float(torch.rand((), generator=generator))
            drawn.append((round(nearest * (most / nearest) ** share), fact))
    # The farthest first: they need the most room.
    for distance, fact in sorted(drawn, key=lambda pair: pair[0], reverse=True):
        same = asked_before.setdefault(tuple(fact.question.tolist()), [])
        for _ in range(TRIES):
            start = randint(0, len(tokens) - len(fact.text) - fact.asking - distance, generator)
            asked = start + len(fact.text) + distance
            answered, end = asked + len(fact.question), asked + fact.asking
            is_plain = all(end <= other_start or other_end <= start for other_start, other_end in same)
            if is_plain and not taken[start : start + len(fact.text)].any() and not taken[asked:end].any():
                same.append((start, end))
                tokens[start : start + len(fact.text)] = fact.text
                tokens[asked:end] = torch.cat([fact.question, fact.answer])
                taken[start : start + len(fact.text)] = True
                taken[asked:end] = True
                answers[answered:end] = True
                break
    return tokens, answers
