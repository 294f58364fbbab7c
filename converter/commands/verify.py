"""``mmod verify``: proves what was written against the base that its manifest names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from converter.commands.requests import VerifyRequest
from converter.errors import SourceError
from converter.layouts import read_checkpoint, with_tokenizer
from converter.proof import Proof, manifest_of, verify
from converter.reporting import Reporter
from converter.source import Snapshot, resolve, resolve_tokenizer


@dataclass(frozen=True)
class Verified:
    """The two models that ``mmod verify`` compared, and the proof."""

    converted: Snapshot
    base: Snapshot
    proof: Proof


def verify_converted(request: VerifyRequest, reporter: Reporter) -> Verified:
    """Prove a converted folder or Hub model against its base.

    Raises:
        VerificationError: it is not what its manifest says.
        MmodError: it or its base cannot be found or read.
    """
    is_folder = Path(request.converted).expanduser().is_dir()
    load = not request.quick and (is_folder if request.load is None else request.load)
    converted = resolve(request.converted, revision=request.revision, compose=True, weights=load)
    source = manifest_of(converted).source
    if request.base is None and source.kind == "folder":
        raise SourceError(
            f"The base of {request.converted} was the local folder {source.name}.", "Say where it is with --base."
        )
    base, base_revision = request.base or source.name, request.base_revision
    if base == source.name and source.kind == "hub":
        base_revision = base_revision or source.revision
    base_snapshot = resolve(base, revision=base_revision, compose=True, weights=False)
    if any(name.endswith(".bin") for name in base_snapshot.weights):
        # Ranges of a .bin file cannot be read by tensor.
        base_snapshot = resolve(base, revision=base_revision, compose=True)
    checkpoint = read_checkpoint(base_snapshot, trust_a_log=True)
    if converted.has_tokenizer() and not base_snapshot.has_tokenizer():
        checkpoint = with_tokenizer(
            checkpoint,
            resolve_tokenizer(converted.name, converted.revision)
            if converted.kind == "hub"
            else resolve_tokenizer(str(converted.folder)),
        )
    proof = verify(converted, checkpoint, quick=request.quick, reporter=reporter)
    if load and not checkpoint.quantisation:
        import torch

        from calibrator.model import load_model

        dtype = getattr(torch, checkpoint.load_dtype)
        load_model(converted.folder, checkpoint.A_log, device=torch.device("cpu"), dtype=dtype, allow_slow=True)
    else:
        runtime = {"gguf": "llama.cpp", "mlx": "mlx-lm"}.get(checkpoint.quantisation, "stock transformers")
        unproved = (*proof.unproved, f"That {runtime} loads it (it was not loaded).")
        proof = dataclasses.replace(proof, unproved=unproved)
    return Verified(converted, base_snapshot, proof)


def sentences(verified: Verified) -> Iterator[str]:
    """What was proved and what was not, in words."""
    proof = verified.proof
    yield (
        f"Proved against {verified.base.name} ({verified.base.revision}): {proof.changed} tensors equal the formula"
        + (f", {proof.identical} are the base's bit for bit." if proof.identical else ".")
    )
    if proof.by_hash:
        yield f"Equal by the Hub's SHA-256, not read: {', '.join(proof.by_hash)}"
    for sentence in proof.unproved:
        yield f"Not proved: {sentence}"
