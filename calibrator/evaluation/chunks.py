"""Questions without long memory (OPRM, arXiv:2505.07793): chunks of a text read one by one, the surest one answers.

Each chunk is read from zero state, the announcement before it and the question behind it. The answer is that of the
chunk after which the prediction of its first token has the lowest entropy. That takes about as many tokens as one
pass, again for every question, and finds a fact anywhere, but nothing that stands in two chunks. The authors also
drop chunks after which an instructed model says that there is no answer; the models here are not instructed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calibrator.evaluation.recall import Answers, Reader, read_answers
from calibrator.facts import Fact
from calibrator.model import StockModel
from converter.errors import UsageError


def in_chunks(window: int) -> Reader:
    """Shows a model ``window`` tokens at once: announcement, chunk and question."""

    def read(stock: StockModel, rows: Tensor, prompt: int, facts: Sequence[Fact], opening: int) -> Answers:
        every = (_surest(stock, row, prompt, fact, opening, window) for row, fact in zip(rows, facts, strict=True))
        return Answers(*map(torch.stack, zip(*every, strict=True)))

    return read


def _surest(stock: StockModel, row: Tensor, prompt: int, fact: Fact, opening: int, window: int) -> Answers:
    """The answer of one chunk of one prompt; each entry is a scalar."""
    asked = prompt - len(fact.question)
    start, end = row[:opening], row[asked : prompt + len(fact.answer)]
    room = window - opening - len(fact.question)
    if room < 1:
        raise UsageError(f"Chunks of {window} tokens have no room beside a question.", "Choose longer ones.")
    *even, last = row[opening:asked].split(room)
    batches = torch.stack(even).split(max(1, stock.tokens_at_once // window)) if even else ()
    found = []
    for batch in (*batches, last[None]):
        texts = torch.cat([start.expand(len(batch), -1), batch, end.expand(len(batch), -1)], dim=1)
        found.append(read_answers(stock, texts, texts.shape[1] - len(fact.answer), [fact] * len(batch)))
    answers = Answers(*map(torch.cat, zip(*found, strict=True)))
    return Answers(*(values[answers.entropy.argmin()] for values in answers))
