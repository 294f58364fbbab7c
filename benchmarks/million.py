"""A million tokens: speed and memory on the 2.7b shape, what calibrated models do there, and states kept rounded.

    python -m benchmarks.million speed
    python -m benchmarks.million effect MODEL --train-len 256 --target-len 8k --data persuasion.txt \\
        --held-out mansfield-park.txt
    python -m benchmarks.million rounded MODEL... --held-out mansfield-park.txt

``effect`` reads the same 131,072 tokens eight times over in one stream, so that the copies differ only by where
they stand. Then it reads them in pieces of 256 tokens after each of which the state is rounded, as servers keep it
between the pieces of a prompt. ``rounded`` does so after every token, as servers do while they generate.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.recall import load, read, read_paragraphs
from calibrator.calibration import calibrate, prepare_calibration
from calibrator.carried_state import State
from calibrator.evaluation.perplexity import prediction_losses, stream_losses
from calibrator.loss import token_losses
from calibrator.methods import METHODS
from calibrator.model import StockModel, device_name
from calibrator.scaling import Scaling
from calibrator.settings import Settings
from converter.lengths import parse_length
from converter.reporting import Reporter

TOKENS, COPIES, PIECE = 131_072, 8, 256
app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
@torch.no_grad()
def speed(model_type: str = "mamba2") -> None:
    """Tokens a second and peak memory of evaluation at 32k and at 1M, random weights in bfloat16."""
    from benchmarks.gpu import noise, random_model

    stock = random_model(model_type)
    found = {}
    with stock.recurrence:
        for length in (1 << 15, 1 << 20):
            tokens = noise(stock, length).cpu()
            prediction_losses(stock, tokens[:, : 1 << 14])
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            prediction_losses(stock, tokens)
            seconds = time.perf_counter() - began
            found[length] = length / seconds, torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps({"device": device_name(stock), "tokens a second, GiB": found}), flush=True)


@torch.no_grad()
def rounded_losses(stock: StockModel, tokens: Tensor, dtype: torch.dtype, size: int = PIECE) -> Tensor:
    """Loss of every prediction of streams (count, length) whose states are rounded after each piece."""
    state: State | None = None
    losses = []
    for start in range(0, tokens.shape[1] - 1, size):
        piece = stock.place(tokens[:, start : start + size + 1])
        with stock.recurrence.carried(state) as after:
            hidden = stock.hidden_states(piece[:, :-1])
        losses.append(token_losses(stock, hidden, piece[:, 1:]))
        state = State(
            {key: dataclasses.replace(value, state=value.state.to(dtype).float()) for key, value in after.items()}
        )
    return torch.cat(losses, dim=1).double().cpu()


def perplexity(losses: Tensor) -> float:
    """Of all predictions."""
    return float(losses.mean().exp())


@app.command()
def effect(
    model: str,
    data: Annotated[str, typer.Option(help="Text to calibrate on.")],
    held_out: Annotated[str, typer.Option(help="Text to read.")],
    out: Annotated[Path, typer.Option(help="JSON file of the results.")],
    train_len: int = 256,
    target_len: str = "8k",
) -> None:
    """Perplexity to a million tokens, and under rounded states, as trained and calibrated."""
    stock = load(model)
    granularity = METHODS["gradient"].granularity(tuple(next(iter(stock.A_log.values())).shape))
    settings = Settings("gradient", granularity, "linear", train_len, parse_length(target_len))
    problem = prepare_calibration(stock, [read(stock, data)], settings, Reporter(), f"million {model}")
    outcome = calibrate(problem)
    problem.journal.remove()
    span = read_paragraphs(stock, held_out).documents[0][:TOKENS]
    result: dict[str, object] = {
        "model": model,
        "device": device_name(stock),
        "kept_step": outcome.record.kept_step,
    }
    scaling = Scaling(stock.mixers, stock.A_log, granularity, "linear")
    with scaling, stock.recurrence, torch.no_grad():
        for name in ("as trained", "converted"):
            if name == "converted":
                scaling.load(outcome.scales)
            stream = stream_losses(stock, span.repeat(COPIES)[None], stock.tokens_at_once)[0]
            result[name] = {
                "64k": perplexity(stream_losses(stock, span.view(2, -1), stock.tokens_at_once)),
                "copies to 1M": [perplexity(part) for part in stream.split(TOKENS)],
                "rounded": {
                    str(dtype): perplexity(rounded_losses(stock, span[None], dtype))
                    for dtype in (torch.float32, torch.bfloat16, torch.float16)
                },
            }
            out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)


@app.command()
def rounded(
    models: list[str],
    held_out: Annotated[str, typer.Option(help="Text to read.")],
    streams: int = 8,
    length: int = 8192,
) -> None:
    """Perplexity over the last half of streams whose state is rounded after every token, each model as it is."""
    for model in models:
        stock = load(model)
        tokens = read_paragraphs(stock, held_out).documents[0][: streams * length].view(streams, length)
        with stock.recurrence:
            found = {
                str(dtype): perplexity(rounded_losses(stock, tokens, dtype, 1)[:, length // 2 :])
                for dtype in (torch.float32, torch.bfloat16, torch.float16)
            }
        print(json.dumps({"model": model, "device": device_name(stock), "perplexity": found}), flush=True)


if __name__ == "__main__":
    app()
