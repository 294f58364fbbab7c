"""``mmod ask``: hides a sentence in a text and asks models for it, one answer beside the other."""

from __future__ import annotations

from typing import Any

from converter.commands.opening import open_model
from converter.commands.requests import AskRequest
from converter.errors import TextError
from converter.lengths import format_length
from converter.reporting import Reporter

HIDDEN_IN = 16384
"""Tokens of the text that a sentence is hidden in, where the text has as many."""


def ask(request: AskRequest, reporter: Reporter, answer: Reporter) -> dict[str, Any]:
    """Ask every model the same question at the end of the same text.

    Args:
        answer: shows the answers.

    Returns:
        The answers as a JSON object.

    Raises:
        MmodError: a model or the text cannot be used, or the text is too short.
    """
    import torch

    from calibrator.evaluation.recall import continue_greedily
    from calibrator.text import check_ids

    hidden, question = request.hide, request.question
    answers = []
    for model in request.models:
        with open_model(model, request, reporter, several=len(request.models) > 1) as opened:
            stock = opened.stock
            fact, asked = (
                torch.tensor(stock.tokenizer(part, add_special_tokens=False).input_ids, dtype=torch.int64)
                for part in (f" {hidden}" if hidden else "", f" {question}")
            )
            for what, ids in (("--hide", fact), ("--question", asked)):
                check_ids(ids, stock.rows, stock.tokenizer, what)
            wanted = request.length or (HIDDEN_IN if hidden else None)
            text = opened.text(2 * wanted if wanted else 1 << 24)
            filler = max(text.documents, key=len)
            whole = len(filler) + len(fact) + len(asked)
            length = request.length or min(whole, wanted or whole)
            if length > whole:
                raise TextError(f"{text.name} has {len(filler)} tokens; {length} are asked for.", "Lower --length.")
            back = max(request.back, len(asked)) if hidden else len(asked)
            before = length - len(fact) - back
            if before < 0:
                what = f"a sentence {back} tokens back" if hidden else "the question"
                fix = "Lower --back or raise --length." if hidden else "Raise --length."
                raise TextError(f"{length} tokens have no room for {what}.", fix)
            prompt = torch.cat([filler[:before], fact, filler[before : length - len(fact) - len(asked)], asked])
            said = stock.tokenizer.decode(continue_greedily(stock, prompt, request.tokens))
        answers.append({"model": opened.snapshot.name, "answer": said.strip()})
    shown = f", {format_length(back)} tokens after the hidden sentence" if hidden else ""
    answer.line(f"At the end of {format_length(length)} tokens of {text.name}{shown}: {question}")
    for entry in answers:
        answer.line(f"{entry['model']}: {entry['answer']}")
    return {
        "question": question,
        "hidden": hidden,
        "length": length,
        "back": back if hidden else None,
        "answers": answers,
    }
