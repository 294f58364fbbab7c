"""Loads a folder with mamba_ssm's own loader and runs it, on a machine without mamba_ssm's compiled parts.

Compiled functions are replaced by the reference functions that mamba_ssm ships beside them, in plain torch; the
loader, the model and everything else are mamba_ssm's.

    python -m tests.consumers.run_mamba_ssm FOLDER OUTPUT TOKEN…
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor
from torch.nn import functional
from transformers.generation import GenerateDecoderOnlyOutput, TextStreamer

from tests.consumers.fetch import FOLDER


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """What causal_conv1d computes: (batch, channels, length) under one filter a channel."""
    width = weight.shape[-1]
    out = functional.conv1d(x, weight[:, None], bias, padding=width - 1, groups=len(weight))
    return functional.silu(out[..., : x.shape[-1]])


def load(folder: str) -> Any:
    """The model as mamba_ssm loads it, on the CPU in float32."""
    sys.path.append(str(FOLDER))
    # transformers looks for triton when it is first used, so it has to be used before triton is replaced.
    assert GenerateDecoderOnlyOutput
    assert TextStreamer
    for compiled in ("triton", "triton.language", "selective_scan_cuda", "mamba_ssm.modules.mamba3"):
        sys.modules[compiled] = MagicMock(__version__="3.0.0")
    triton: Any = sys.modules["triton"]
    triton.autotune = lambda configs, **_: lambda kernel: SimpleNamespace(configs=configs)
    triton.heuristics = lambda _: lambda kernel: kernel
    triton.Config = lambda kwargs, **_: SimpleNamespace(kwargs=kwargs, num_warps=1)
    from mamba_ssm.models import mixer_seq_simple
    from mamba_ssm.modules import block, mamba2, mamba_simple
    from mamba_ssm.ops import selective_scan_interface
    from mamba_ssm.ops.triton import layer_norm, layernorm_gated, ssd_combined

    def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, **settings: Any) -> Any:
        # The reference always adds the residual in float32, which is what these two ask for.
        assert settings.pop("is_rms_norm") and settings.pop("residual_in_fp32")
        return layer_norm.rms_norm_ref(x, weight, bias, upcast=True, **settings)

    for module in (block, mixer_seq_simple):
        module.layer_norm_fn = normalise
    for module in (mamba_simple, selective_scan_interface):
        module.selective_scan_fn = selective_scan_interface.selective_scan_ref
    ssd_combined.causal_conv1d_fn = convolve
    ssd_combined.rmsnorm_fn = layernorm_gated.rms_norm_ref
    mamba2.mamba_split_conv1d_scan_combined = lambda *args, seq_idx, **kw: ssd_combined.mamba_split_conv1d_scan_ref(
        *args, **kw
    )
    return mixer_seq_simple.MambaLMHeadModel.from_pretrained(folder, device="cpu", dtype=torch.float32)


def main() -> None:
    """Write the logits (length, vocabulary) into a file."""
    folder, output, *tokens = sys.argv[1:]
    model = load(folder)
    with torch.no_grad():
        logits = model(torch.tensor([[int(token) for token in tokens]])).logits[0]
    torch.save(logits.float(), output)


if __name__ == "__main__":
    main()
