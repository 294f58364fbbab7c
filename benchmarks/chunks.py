"""What the Hub's chunk store keeps of a model whose A_log changed, measured with the Hub's own chunker.

    python -m benchmarks.chunks

The source's weights are uploaded with hf-xet into an empty store on the disk, then the scaled copy's: chunks of
about 64 KiB, cut by content, that the store has already are not sent. Two models: the bundled demo, and random
numbers in the shapes of a larger Mamba-2 with A_log in bf16 as the rest. The source is either a PyTorch file in the
state-spaces layout, as the original Mamba models are published, or a safetensors file in the transformers layout.
The copy has A_log in float32 (which moves it to the file's start where it was narrower) or in the source's format.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.synthetic import constant_scales, write_checkpoint
from converter.baking import ALogDtype, bake
from converter.layouts import read_checkpoint
from converter.safetensors_file import from_float64, read_header
from converter.source import resolve

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Travel:
    """What one upload cost: chunks and bytes in all, and those that were not in the store."""

    chunks: int
    new_chunks: int
    size: int
    new_bytes: int


def upload(path: Path, store: Path) -> Travel:
    """Upload a file into a store on the disk, in a session of its own."""
    import hf_xet

    with hf_xet.XetSession().new_upload_commit(endpoint=f"local://{store}") as commit:
        upload = commit.start_upload_file(str(path), sha256=hf_xet.SKIP_SHA256)
    found = upload.result().dedup_metrics
    return Travel(found.total_chunks, found.new_chunks, found.total_bytes, found.new_bytes)


def fill_with_noise(path: Path) -> None:
    """Give a file of bf16 tensors numbers that never repeat, with A_log between -1 and 3."""
    generator = np.random.default_rng(0)
    with path.open("r+b") as file:
        header = read_header(file, path.name)
        for tensor in header.tensors:
            file.seek(header.starts[tensor.name])
            if tensor.name.endswith("A_log"):
                file.write(from_float64(generator.uniform(-1, 3, tensor.shape), tensor.dtype))
            else:
                noise = generator.standard_normal(tensor.nbytes // 2, np.float32)
                file.write((noise.view("<u4") >> np.uint32(16)).astype("<u2").tobytes())


def write_torch_file(weights: Path, path: Path) -> None:
    """The tensors of a safetensors file as mamba_ssm saves them, one pickled file with the tied head in it."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(weights)
    tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"]
    torch.save(tensors, path)


def compare(model: Path, sources: dict[str, Path], formats: tuple[ALogDtype, ...]) -> Iterator[tuple[str, ...]]:
    """Upload each source, and each scaled copy after it into the same store; yields rows of the table.

    Args:
        model: folder of the model that is scaled.
        sources: kind of file to the file.
    """
    checkpoint = read_checkpoint(resolve(str(model)))
    for a_log_dtype in formats:
        with tempfile.TemporaryDirectory(dir=model.parent) as temporary:
            scaled = Path(temporary, "scaled")
            scaled.mkdir()
            bake(checkpoint, scaled, scales=constant_scales(checkpoint, 1.5), a_log_dtype=a_log_dtype)
            for kind, source in sources.items():
                store = Path(temporary, kind)
                upload(source, store)
                travel = upload(scaled / WEIGHTS, store)
                equal = f"{100 * (1 - travel.new_bytes / travel.size):.1f} %"
                amounts = (f"{travel.size / 1e6:.1f} MB", f"{travel.chunks:,}", f"{travel.new_chunks:,}")
                yield kind, a_log_dtype, *amounts, f"{travel.new_bytes / 1e6:.2f} MB", equal


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    print("| model | source | A_log | size | chunks | new chunks | new bytes | equal |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(prefix="mmod-chunks-") as temporary:
        work = Path(temporary)
        # hf-xet keeps logs and a cache of what it uploaded; they must not outlive the measurement.
        os.environ["HF_HOME"] = str(work / "home")
        demo, large, torch_file = work / "demo", work / "large", work / "pytorch_model.bin"
        demo.mkdir()
        bundled = resolve("demo")
        bake(read_checkpoint(bundled), demo, scales=None)
        write_checkpoint(large, hidden=options.hidden, layers=options.layers, shards=1)
        fill_with_noise(large / WEIGHTS)
        write_torch_file(large / WEIGHTS, torch_file)
        for name, model, pickled, formats in (
            ("demo", demo, bundled.folder / "pytorch_model.bin", ("float32",)),
            (f"Mamba-2, {options.layers} layers of {options.hidden}", large, torch_file, ("float32", "keep")),
        ):
            sources = {"PyTorch": pickled, "safetensors": model / WEIGHTS}
            for row in compare(model, sources, formats):  # type: ignore[arg-type]
                print(f"| {name} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
