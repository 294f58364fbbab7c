"""Perplexity of MLX folders in mlx-lm itself, on the CPU, and what they write after a few words.

    MLX/bin/python -m benchmarks.mlx FOLDER... --text mansfield-park.txt

Runs in an environment of its own, of mlx-lm and mlx[cpu]; nothing of this tool is imported. Both lengths tile the
same tokens, and all predictions of a window count. Windows run in pieces that carry their state in mlx-lm's cache.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import typer
from mlx.nn.losses import cross_entropy
from mlx_lm import generate, load

LENGTHS = (256, 8192)
PIECE, BATCH = 256, 8
PROMPT = "It is a truth universally"


def perplexity(model: Any, tokens: Any, length: int) -> float:
    """Of windows of one length that tile the tokens."""
    windows = tokens.reshape(-1, length)
    total = 0.0
    for start in range(0, len(windows), BATCH):
        batch, cache = windows[start : start + BATCH], model.make_cache()
        for first in range(0, length, PIECE):
            target = batch[:, first + 1 : first + PIECE + 1]
            scores = model(batch[:, first : first + PIECE], cache=cache)[:, : target.shape[1]]
            loss = cross_entropy(scores.astype(mx.float32), target, reduction="sum")
            mx.eval(loss, [layer.state for layer in cache])
            total += loss.item()
    return math.exp(total / len(windows) / (length - 1))


def main(folders: list[Path], text: Annotated[Path, typer.Option()]) -> None:
    """Print a line for each folder."""
    for folder in folders:
        model, tokenizer = load(str(folder))[:2]
        tokens = mx.array(tokenizer.encode(text.read_text())[: 2 * LENGTHS[-1]])
        figures = {length: round(perplexity(model, tokens, length), 2) for length in LENGTHS}
        typer.echo(f"{folder.name} {figures} {generate(model, tokenizer, PROMPT, max_tokens=8)!r}")


if __name__ == "__main__":
    typer.run(main)
