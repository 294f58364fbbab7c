"""Passkey retrieval (Mamba Modulation, section 6.2): five digits hidden in a long text, asked for at its end."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from calibrator.text import Text
from converter.errors import TextError, UsageError
from converter.lengths import format_length
from converter.reporting import Reporter

OPENING = "A pass key is hidden in the text below. Find it and remember it."
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "Answer:"
NEW_TOKENS = 10


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        length: tokens asked for.
        depth: where the key stands, from 0 (start) to 1 (end).
        key: five digits.
        tokens: prompt that ends in the question: ``length`` tokens, or fewer by less than a sentence.
        answer: tokens of the key after the question.
    """

    length: int
    depth: float
    key: str
    tokens: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Cell:
    """One length and depth: how many of its samples were solved."""

    length: int
    depth: float
    samples: int
    solved: int


class Filler:
    """Consecutive sentences of a text, tokenised once.

    Args:
        text: what to fill with; any prose will do.
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, text: Text, tokenizer: Any) -> None:
        prose = " ".join(" ".join(tokenizer.decode(document).split()) for document in text.documents)
        sentences = [sentence for sentence in re.split(r"(?<=[.!?])\s+", prose) if sentence]
        self.text = text
        self.tokenizer = tokenizer
        spaced = [" " + sentence for sentence in sentences]
        encoded = tokenizer(spaced, add_special_tokens=False).input_ids
        self._sentences = [torch.tensor(ids, dtype=torch.int64) for ids in encoded]

    def encode(self, text: str) -> Tensor:
        """Tokens of a piece of text, with none added before or after it."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)

    def draw(self, room: int, generator: random.Random) -> list[Tensor]:
        """Consecutive sentences from a random place on until the next would not fit into ``room`` tokens.

        At the text's end they start over, as often as it takes.

        Raises:
            TextError: not one sentence fits.
        """
        if min(map(len, self._sentences), default=room + 1) > room:
            raise TextError(f"No sentence of {self.text.name} fits beside the pass key.", "Choose longer lengths.")
        start = generator.randrange(len(self._sentences))
        going_round = cycle(self._sentences[start:] + self._sentences[:start])
        sentence = next(sentence for sentence in going_round if len(sentence) <= room)
        chosen: list[Tensor] = []
        while len(sentence) <= room:
            room -= len(sentence)
            chosen.append(sentence)
            sentence = next(going_round)
        return chosen


def make_sample(filler: Filler, length: int, depth: float, generator: random.Random) -> Sample:
    """Write one question of at most ``length`` tokens.

    Raises:
        TextError: ``length`` leaves no room for a sentence of the filler.
    """
    key = str(generator.randrange(10_000, 100_000))
    prefix = filler.tokenizer("").input_ids
    opening = torch.cat([torch.tensor(prefix, dtype=torch.int64), filler.encode(OPENING)])
    needle, question = filler.encode(" " + NEEDLE.format(key=key)), filler.encode(" " + QUESTION)
    room = length - len(opening) - len(needle) - len(question)
    sentences = filler.draw(room, generator)
    total = sum(map(len, sentences))
    before: list[Tensor] = []
    while sentences and sum(map(len, before)) + len(sentences[0]) / 2 < depth * total:
        before.append(sentences.pop(0))
    tokens = torch.cat([opening, *before, needle, *sentences, question])
    return Sample(length, depth, key, tokens, filler.encode(" " + key))


def make_samples(
    filler: Filler, lengths: Sequence[int], depths: Sequence[float], samples: int, seed: int
) -> list[Sample]:
    """Questions for every length and depth; each cell's draws depend on the seed and the cell alone.

    Raises:
        UsageError: a depth is not between 0 and 1.
    """
    for depth in depths:
        if not 0 <= depth <= 1:
            raise UsageError(f"The depth {depth} is not between 0 and 1.", "Write --depths 0,0.25,0.5,0.75,1.")
    return [
        make_sample(filler, length, depth, random.Random(f"{seed} {length} {depth} {number}"))
        for length in lengths
        for depth in depths
        for number in range(samples)
    ]


@torch.no_grad()
def measure_retrieval(
    model: Any, tokenizer: Any, samples: Sequence[Sample], reporter: Reporter, what: str
) -> list[Cell]:
    """Ask a model every question, greedily and ``NEW_TOKENS`` tokens long.

    Args:
        model: anything with transformers' ``generate``.

    Returns:
        One cell for every length and depth among the samples, in their order.
    """
    solved: dict[tuple[int, float], list[bool]] = {}
    with reporter.task(f"Pass keys of {what}", sum(sample.length for sample in samples)) as task:
        for sample in samples:
            prompt = sample.tokens[None].to(model.device)
            answer = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                num_beams=1,
                pad_token_id=tokenizer.eos_token_id or 0,
            )
            said = tokenizer.decode(answer[0, prompt.shape[1] :])
            solved.setdefault((sample.length, sample.depth), []).append(is_solved(sample.key, said))
            task.describe(f"Pass keys of {what} at {format_length(sample.length)}")
            task.advance(sample.length)
    return [Cell(length, depth, len(rows), sum(rows)) for (length, depth), rows in solved.items()]


def is_solved(key: str, said: str) -> bool:
    """Whether the key is one of the words of an answer."""
    return key in re.findall(r"\w+", said)
