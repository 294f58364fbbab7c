"""Quantises folders, and compares what quantised ones answer in stock transformers and as this tool loads them.

    python -m tests.consumers.run_quantised quantise FOLDER...              writes FOLDER-METHOD for each method
    python -m tests.consumers.run_quantised compare FOLDER EXPECTED ...
    python -m tests.consumers.run_quantised descend FOLDER COPY...

torchao writes its copies itself. The file format of compressed-tensors is written here, since its own quantiser
is a package of many others; transformers loads it with compressed-tensors.
"""

from __future__ import annotations

import json
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.consumers.fetch import FOLDER, QUANTISED

sys.path.append(str(FOLDER / "quantisers"))
from transformers import AutoConfig, AutoModelForCausalLM

GROUP = 64


def quantise(method: str, folder: Path, output: Path) -> None:
    """Write a quantised copy."""
    if method.startswith("compressed-tensors"):
        _write_compressed_tensors(folder, output, packed=method.endswith("w4a16"))
        return
    from torchao.quantization import Float8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    four_bits = IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP))
    config = TorchAoConfig(Float8WeightOnlyConfig() if method == "torchao-fp8" else four_bits)
    # In bfloat16 it would round A_log before the copy is scaled, and the copies would differ by that.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(output)
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, output)


def _write_compressed_tensors(folder: Path, output: Path, packed: bool) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    shutil.copytree(folder, output, ignore=lambda *_: {"state-spaces"})
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name).float()
        groups = weight.unflatten(1, (-1, GROUP if packed else weight.shape[1]))
        largest = 7.5 if packed else torch.finfo(torch.float8_e4m3fn).max
        scale = (groups.abs().amax(2, keepdim=True) / largest).bfloat16()
        tensors[f"{name}_scale"] = scale[..., 0].contiguous()
        values = (groups / scale.float()).flatten(1)
        if packed:
            tensors[f"{name}_packed"] = pack_to_int32(values.round().clamp(-8, 7).to(torch.int8), 4)
            tensors[f"{name}_shape"] = torch.tensor(weight.shape)
        else:
            tensors[name] = values.to(torch.float8_e4m3fn)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    group: dict[str, Any]
    if packed:
        group = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}}
    else:
        eight = {"num_bits": 8, "type": "float"}
        group = {
            "weights": eight | {"strategy": "channel"},
            "input_activations": eight | {"dynamic": True, "strategy": "token"},
        }
    number_format = "pack-quantized" if packed else "float-quantized"
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": number_format,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group | {"format": number_format, "targets": ["Linear"]}},
    }
    (output / "config.json").write_text(json.dumps(config))


def _stock(folder: Path) -> Any:
    """A quantised folder in stock transformers, which loads packed layers of Mamba only if it unpacks them."""
    config = AutoConfig.from_pretrained(folder)
    if folder.name.endswith("w4a16"):
        config.quantization_config["dequantize"] = True
    return AutoModelForCausalLM.from_pretrained(folder, config=config).eval()


@torch.no_grad()
def compare(folder: Path, expected: Path) -> None:
    """Two quantised folders answer alike, bit for bit, whether stock transformers or this tool loads them."""
    from calibrator.model import load_model
    from converter.layouts import read_checkpoint
    from converter.source import resolve

    tokens = torch.randint(1, 4096, (1, 600), generator=torch.Generator().manual_seed(0))
    found, wanted = (_stock(place)(tokens, use_cache=False).logits.float() for place in (folder, expected))
    assert torch.isfinite(wanted).all()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    A_log = read_checkpoint(resolve(str(folder), compose=True)).A_log
    stock = load_model(folder, A_log, device=torch.device("cpu"))
    torch.testing.assert_close(stock.logits(stock.hidden_states(tokens)), wanted, rtol=0, atol=0)


def gradients(folder: Path) -> torch.Tensor:
    """The gradient of a loss by every log s, in one vector."""
    from calibrator.loss import token_losses
    from calibrator.model import load_model
    from calibrator.scaling import Scaling
    from converter.layouts import read_checkpoint
    from converter.source import resolve

    A_log = read_checkpoint(resolve(str(folder), compose=True)).A_log
    stock = load_model(folder, A_log, device=torch.device("cpu"))
    tokens = torch.randint(256, (2, 101), generator=torch.Generator().manual_seed(0))
    with Scaling(stock.mixers, stock.A_log, "head", "linear") as scaling, stock.recurrence:
        token_losses(stock, stock.hidden_states(tokens[:, :-1]), tokens[:, 1:]).mean().backward()
        return torch.cat([log_s.grad.flatten() for log_s in scaling.parameters()])


def descend(folder: Path, copies: list[Path]) -> None:
    """Every factor has a gradient through quantised layers, and it points where that of the plain ones does."""
    wanted = gradients(folder)
    for copy in copies:
        found = gradients(copy)
        cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=0)
        assert found.all() and cosine > 0.95, f"{copy.name}: {cosine:.3f}, {found}, {wanted}"


def main() -> None:
    """Quantise folders by every method, compare pairs of quantised ones, or compare gradients."""
    verb, folders = sys.argv[1], [Path(word) for word in sys.argv[2:]]
    if verb == "quantise":
        for folder, method in product(folders, QUANTISED):
            quantise(method, folder, folder.with_name(f"{folder.name}-{method}"))
    elif verb == "descend":
        descend(folders[0], folders[1:])
    else:
        for folder, expected in zip(folders[::2], folders[1::2], strict=True):
            compare(folder, expected)


if __name__ == "__main__":
    main()
