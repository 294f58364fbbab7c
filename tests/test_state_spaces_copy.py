"""The copy in the state-spaces layout that a conversion adds is proved with it, in either direction."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from converter.commands import convert
from converter.commands.cli import app
from converter.commands.convert import prepare
from converter.commands.requests import ConvertRequest
from converter.digests import sealed
from converter.errors import LayoutError, VerificationError
from converter.layouts import Checkpoint, read_checkpoint
from converter.layouts.state_spaces import COPIED_CONFIG, COPIED_WEIGHTS, SUBFOLDER, write_state_spaces
from converter.manifest import Manifest
from converter.proof import Counts, verify
from converter.reporting import Reporter
from tests.conversions import write_records
from tests.hub_server import HubServer
from tests.small_checkpoints import (
    CONFIG,
    LAYERS,
    random_scales,
    source,
    tensors,
    write_state_spaces_source,
    write_transformers,
)
from tests.tiny_models import tiny_model

D = "backbone.layers.1.mixer.D"
A_LOG = "backbone.layers.1.mixer.A_log"
EMBEDDING = "backbone.embedding.weight"


def write_bf16_A_log(folder: Path) -> Path:
    """A source whose A_log changes its number format."""
    return write_transformers(folder, 2, content=tensors(A_log_dtype=torch.bfloat16))


def write_untied(folder: Path) -> Path:
    """A source with an output layer of its own."""
    content = tensors()
    head = content["backbone.embeddings.weight"].flip(0).contiguous()
    return write_transformers(
        folder, config={**CONFIG, "tie_word_embeddings": False}, content={**content, "lm_head.weight": head}
    )


def both_layouts(folder: Path, out: Path) -> Checkpoint:
    """Convert a folder with random factors into both layouts, and return what was converted."""
    checkpoint = read_checkpoint(source(folder))
    out.mkdir()
    write_records(out, checkpoint, random_scales({name: tensor.shape for name, tensor in checkpoint.A_log.items()}))
    write_state_spaces(checkpoint, out, out / SUBFOLDER)
    manifest = Manifest.read(out)
    assert manifest is not None
    sealed(manifest, out).write(out)
    return checkpoint


@pytest.mark.parametrize("write", [write_transformers, write_bf16_A_log, write_untied, write_state_spaces_source])
def test_honest_copy_is_proved_in_either_direction(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    base = both_layouts(write(tmp_path / "model"), tmp_path / "out")
    proof = verify(source(tmp_path / "out"), base)
    assert proof.state_spaces == Counts(identical=27, changed=LAYERS)
    assert proof.unproved == ()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (D, r"layers\.1\.mixer\.D differs from the base's .*state-spaces/pytorch_model\.bin"),
        (A_LOG, r"A_log is not A_log \+ log s of the base's \(state-spaces/pytorch_model\.bin"),
        (EMBEDDING, r"embeddings\.weight differs from the base's .*state-spaces/pytorch_model\.bin"),
    ],
)
def test_one_flipped_bit_of_the_copy_is_found(tmp_path: Path, name: str, said: str) -> None:
    base = both_layouts(write_transformers(tmp_path / "model"), tmp_path / "out")
    flip_bit(tmp_path / "out" / COPIED_WEIGHTS, name)
    with pytest.raises(VerificationError, match=said):
        verify(source(tmp_path / "out"), base)
    proof = verify(source(tmp_path / "out"), base, quick=True)
    assert proof.state_spaces is None
    assert "copy in state-spaces/" in " ".join(proof.unproved)


def flip_bit(weights: Path, name: str) -> None:
    """Flip one bit of one tensor's last number where it lies in a .bin file."""
    value = torch.load(weights, weights_only=True)[name]
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    content = weights.read_bytes()
    assert content.count(data) == 1
    last = content.index(data) + len(data) - 1
    weights.write_bytes(content[:last] + bytes([content[last] ^ 1]) + content[last + 1 :])


def drop(name: str) -> Callable[[dict[str, Any]], object]:
    """Take a tensor out."""
    return lambda content: content.pop(name)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop(D), "state-spaces/: Tensor .*D of the base is missing"),
        (drop("lm_head.weight"), "has no lm_head.weight"),
        (drop(EMBEDDING), "has no backbone.embedding.weight"),
        (lambda content: content.update(more=torch.ones(1)), "state-spaces/: Tensor more .* is not in the base"),
        (lambda content: content.update({D: content[D].float()}), "state-spaces/: Tensor .*D is F32"),
        (
            lambda content: content.update({"lm_head.weight": content["lm_head.weight"] + 1}),
            r"embeddings\.weight differs from the base's",
        ),
    ],
)
def test_other_tensors_in_the_copy_are_named(
    tmp_path: Path, damage: Callable[[dict[str, Any]], object], said: str
) -> None:
    base = both_layouts(write_transformers(tmp_path / "model"), tmp_path / "out")
    content = torch.load(tmp_path / "out" / COPIED_WEIGHTS, weights_only=True)
    damage(content)
    torch.save(content, tmp_path / "out" / COPIED_WEIGHTS)
    with pytest.raises(VerificationError, match=said):
        verify(source(tmp_path / "out"), base)


def test_config_of_the_copy_is_held_against_the_base(tmp_path: Path) -> None:
    base = both_layouts(write_transformers(tmp_path / "model"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / COPIED_CONFIG).read_text())
    (tmp_path / "out" / COPIED_CONFIG).write_text(json.dumps({**config, "n_layer": 2}))
    with pytest.raises(VerificationError, match=r"state-spaces/config\.json is not what the base"):
        verify(source(tmp_path / "out"), base)


def test_command_proves_the_copy_on_the_hub_too(hub: HubServer, tmp_path: Path) -> None:
    both_layouts(write_transformers(tmp_path / "model"), tmp_path / "out")
    hub.add_repo("acme/converted", tmp_path / "out")
    options = ["--base", str(tmp_path / "model"), "--no-load"]
    done = CliRunner().invoke(app, ["verify", "acme/converted", *options, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["state_spaces"] == {"identical_tensors": 27, "changed_tensors": LAYERS}
    assert "Of the copy in the state-spaces layout 3 tensors equal the formula" in done.stderr
    flip_bit(tmp_path / "out" / COPIED_WEIGHTS, D)
    hub.add_repo("acme/damaged", tmp_path / "out")
    done = CliRunner().invoke(app, ["verify", "acme/damaged", *options])
    assert isinstance(done.exception, VerificationError)


def test_copy_that_mamba_ssm_cannot_have_is_refused_before_anything_slow(tmp_path: Path) -> None:
    tiny_model("jamba").save_pretrained(tmp_path / "model")
    with pytest.raises(LayoutError, match="jamba"):
        prepare(ConvertRequest(str(tmp_path / "model"), output=tmp_path / "out", layout="both"), Reporter(), None)


def test_conversion_with_a_damaged_copy_never_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_damaged(checkpoint: Checkpoint, folder: Path, subfolder: Path) -> None:
        write_state_spaces(checkpoint, folder, subfolder)
        flip_bit(subfolder / "pytorch_model.bin", D)

    words = ["convert", "demo", "--method", "constant", "--factor", "1.5", "--windows", "0", "--layout", "both"]
    words += ["--output", str(tmp_path / "out"), "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_state_spaces", write_damaged)
        done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, VerificationError)
    assert not any(tmp_path.iterdir())
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (tmp_path / "out" / COPIED_WEIGHTS).is_file()
