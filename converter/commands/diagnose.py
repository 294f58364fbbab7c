"""``mmod diagnose``: tells whether a model needs scaling, from what it does on long text. Writes nothing."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from converter.commands.opening import open_model
from converter.commands.requests import DiagnoseRequest
from converter.errors import TextError, UsageError
from converter.lengths import format_length
from converter.reporting import Reporter
from converter.rope import rope_entries

# A perplexity within this share of a sliding window's counts as steady.
STEADY = 0.02
# A fact counts as remembered where so large a share of the questions is answered.
REMEMBERED = 0.5
PROMPTS = 16


def diagnose(request: DiagnoseRequest, reporter: Reporter, answer: Reporter) -> dict[str, Any]:
    """Measure a model on one long text and say what that means.

    Args:
        answer: shows the tables and the verdict.

    Returns:
        What was measured as a JSON object, with ``verdict``, sentences, and ``needs_scaling``.

    Raises:
        MmodError: the model or the text cannot be used, or the text is too short.
    """
    import torch

    from calibrator.evaluation.baselines import choose_window, sliding_losses
    from calibrator.evaluation.memory import share_found
    from calibrator.evaluation.perplexity import mean_by_position, prediction_losses
    from calibrator.evaluation.recall import measure_recall
    from calibrator.facts import FactSource
    from calibrator.skills import Skills, near_and_far
    from calibrator.train_len import find_train_len

    target_len = request.target_len
    with open_model(request.model, request, reporter) as opened:
        stock, name = opened.stock, opened.snapshot.name
        text = opened.text(8 * target_len)
        rope = rope_entries(opened.checkpoint, request.rope)
        train_len = request.train_len or find_train_len(stock, name, opened.snapshot.kind, [text], reporter)[0]
        if target_len < 2 * train_len:
            raise UsageError(
                f"{name} was trained at {train_len} tokens, and {target_len} is less than twice that.",
                "Give a longer --target-len.",
            )
        target_len = target_len // train_len * train_len
        longest = max(text.documents, key=len)
        rest = longest[target_len:]
        if len(rest) < 2 * train_len:
            raise TextError(
                f"{text.name} has {len(longest)} tokens; {target_len + 2 * train_len} are needed.",
                "Give a longer text, or a shorter --target-len.",
            )
        span = longest[None, :target_len]
        window = choose_window(stock, [rest], train_len, target_len)
        sliding = sliding_losses(stock, span[:, : target_len // window * window], window)
        if rope:
            stock.extend_positions(rope)
        with torch.no_grad():
            losses = prediction_losses(stock, span)[:, : sliding.shape[1]]
        by_position = {edge: math.exp(loss) for edge, loss in mean_by_position(losses).items()}
        steady = {edge: math.exp(loss) for edge, loss in mean_by_position(sliding).items()}
        source = FactSource(text.documents, stock.tokenizer)
        skills = Skills(stock, source, train_len, target_len, reporter)
        skills.begin()
        far = [distance for distance in (2 * train_len, 4 * train_len, 8 * train_len) if distance < target_len]
        places = {target_len: (*near_and_far(train_len), *far)}
        cells = measure_recall(stock, source, skills.kinds, places, PROMPTS, request.seed, reporter, name)
    found = {cell.kind: {c.distance: share_found(c) for c in cells if c.kind == cell.kind} for cell in cells}
    last, measured = max(by_position), sliding.shape[1] + 1
    needs_scaling, verdict = _judge(
        by_position[last], steady[max(steady)], window, train_len, measured, target_len, found, skills.sentence()
    )
    rows = [
        (format_length(edge), f"{value:.2f}", f"{steady[edge]:.2f}" if edge in steady else "-")
        for edge, value in by_position.items()
    ]
    shown = f"{name}, {request.rope}," if request.rope else name
    title = f"Perplexity of {shown} by position, up to; beside it a sliding window of {window} tokens, state reset"
    answer.table(title, ("tokens", "one pass", "sliding"), rows)
    if found:
        distances = sorted({distance for row in found.values() for distance in row})
        answer.table(
            f"Facts found in {format_length(target_len)} tokens of {text.name}, {PROMPTS} prompts each",
            ("fact", *(f"{format_length(distance)} back" for distance in distances)),
            [(kind, *(f"{row[d]:.0%}" if d in row else "-" for d in distances)) for kind, row in found.items()],
        )
    for sentence in verdict:
        answer.line(sentence)
    return {
        "model": name,
        "revision": opened.snapshot.revision,
        "text": dataclasses.asdict(text.record("held-out")),
        "train_len": train_len,
        "target_len": target_len,
        "by_position": {str(edge): value for edge, value in by_position.items()},
        "rope": request.rope,
        "sliding": {"window": window, "by_position": {str(edge): value for edge, value in steady.items()}},
        "recall": [cell.record() for cell in cells],
        "needs_scaling": needs_scaling,
        "verdict": verdict,
    }


def _judge(
    perplexity: float,
    sliding: float,
    window: int,
    train_len: int,
    measured: int,
    target_len: int,
    found: dict[str, dict[int, float]],
    skills: str,
) -> tuple[bool, list[str]]:
    """Whether scaling is called for, and why, in sentences.

    Args:
        measured: tokens of the text that ``perplexity`` and ``sliding`` end at.
        target_len: those of the texts in which facts were ``found``.
    """
    shown, steady = format_length(target_len), format_length(measured)
    breaks = not perplexity <= sliding * (1 + STEADY)
    if breaks:
        sentences = [
            f"Yes: near {steady} tokens the perplexity is {perplexity:.2f}, where a sliding window of {window} "
            f"tokens has {sliding:.2f}. Scaling A is made for this: mmod convert."
        ]
    else:
        sentences = [
            f"No: the model is steady to {steady} tokens (perplexity {perplexity:.2f}, a sliding window has "
            f"{sliding:.2f})."
        ]
    if not found:
        return breaks, [*sentences, skills]
    kind, distance = max(((kind, _reach(row)) for kind, row in found.items()), key=lambda pair: pair[1])
    forgets = distance < train_len // 2
    if distance:
        sentences.append(
            f"In {shown} tokens it finds a {kind} up to {format_length(distance)} tokens back in half of the cases "
            "or more."
        )
    else:
        sentences.append(f"In {shown} tokens it finds nothing of what it finds within {train_len}.")
    if forgets and not breaks:
        sentences.append(
            "It is steady but forgets: scaling A may bring back what it finds within its training length."
        )
    return breaks or forgets, sentences


def _reach(row: dict[int, float]) -> int:
    """The farthest distance up to which facts are found at every distance."""
    reach = 0
    for distance, share in sorted(row.items()):
        if share < REMEMBERED:
            break
        reach = distance
    return reach
