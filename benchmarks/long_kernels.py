"""Where the kernels go wrong: one wide random layer, in one pass and in carried pieces, at growing lengths.

    python -m benchmarks.long_kernels --hidden 4096 --lengths 64k,128k,256k

Prints a row for each model type and length: tokens times the widest row of the layer, as a share of 2^31, and the
largest difference of a loss in nats. The limit that keeps the tool below 2^31 is off.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from calibrator.evaluation.perplexity import stream_losses
from calibrator.loss import window_losses
from calibrator.model import StockModel, load_model
from converter.layouts import read_checkpoint
from converter.lengths import format_length, parse_length
from converter.source import resolve

VOCABULARY, PIECE = 512, 8192


def wide_layer(kind: str, hidden: int) -> Any:
    """A random model of one layer, and the widest row of its activations."""
    usual = {"vocab_size": VOCABULARY, "hidden_size": hidden, "num_hidden_layers": 1, "state_size": 128}
    if kind == "mamba2":
        heads = 2 * hidden // 64
        return Mamba2ForCausalLM(Mamba2Config(**usual, num_heads=heads, head_dim=64, n_groups=1, expand=2))
    return MambaForCausalLM(MambaConfig(**usual | {"state_size": 16}))


def open_layer(kind: str, hidden: int) -> StockModel:
    """The random model as the tool loads one, in bfloat16."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = wide_layer(kind, hidden).to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        # Every checkpoint has a tokenizer; none of its tokens is used.
        for file in resolve("demo").folder.glob("tokenizer*"):
            shutil.copy(file, temporary)
        checkpoint = read_checkpoint(resolve(temporary))
        return load_model(Path(temporary), checkpoint.A_log, device=device, dtype=torch.bfloat16)


@torch.no_grad()
def main(
    hidden: Annotated[int, typer.Option(help="Hidden size; the layer is twice as wide.")] = 4096,
    lengths: Annotated[str, typer.Option(help="Lengths, comma-separated.")] = "32k,64k,128k,256k",
    kinds: Annotated[str, typer.Option(help="Model types.")] = "mamba2,mamba",
) -> None:
    """Print the table."""
    for kind in kinds.split(","):
        stock = open_layer(kind, hidden)
        width = max(module.out_features for module in stock.model.modules() if hasattr(module, "out_features"))
        for length in map(parse_length, lengths.split(",")):
            tokens = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))
            share = length * width / 2**31
            with stock.recurrence, patch.object(stock.recurrence, "longest_pass", length):
                pieces = stream_losses(stock, tokens, PIECE)[0]
                print(f"{kind}, hidden {hidden}, {format_length(length)}: {share:.2f} of 2^31", end="", flush=True)
                # An illegal access ends the process: run lengths near the limit one at a time.
                whole = window_losses(stock, tokens.to(stock.device))[0].double().cpu()
            apart = (whole - pieces).abs()
            print(f", largest difference {float(apart.max()):.3g} nats, mean {float(apart.mean()):.2g}", flush=True)


if __name__ == "__main__":
    typer.run(main)
