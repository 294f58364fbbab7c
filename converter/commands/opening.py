"""From a model's name to a loaded stock model: its tokenizer, and a working copy where stock code needs one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.baking import bake
from converter.errors import LayoutError, SourceError, UsageError
from converter.layouts import Checkpoint, read_checkpoint, with_tokenizer
from converter.manifest import TokenizerRecord
from converter.reporting import Reporter
from converter.safetensors_file import parse_json_object
from converter.source import Snapshot, resolve, resolve_tokenizer
from converter.temporary import temporary_folder

if TYPE_CHECKING:
    from calibrator.model import StockModel
    from calibrator.text import Text
    from converter.commands.requests import ConvertRequest, MeasureRequest

NOVELS = Path(__file__).parents[1] / "demo" / "texts"
CALIBRATION_NOVEL = str(NOVELS / "persuasion.txt")
HELD_OUT_NOVEL = str(NOVELS / "northanger-abbey.txt")
NEOX_TOKENIZER = "EleutherAI/gpt-neox-20b"


def add_tokenizer(
    checkpoint: Checkpoint, named: str | None, reporter: Reporter, recorded: TokenizerRecord | None = None
) -> Checkpoint:
    """The checkpoint, with a tokenizer added if it has none.

    One that is neither named nor recorded is GPT-NeoX's for the state-spaces layout, and none for any other.

    Args:
        named: folder or Hub id that the user chose.
        recorded: what an earlier conversion took, which is taken again unless another is named.

    Raises:
        UsageError: one is named although stock code loads the checkpoint's own, or it has too many tokens.
        SourceError: it cannot be found.
    """
    snapshot = checkpoint.snapshot
    if snapshot.has_tokenizer() and not (named and is_tokenizer_code(snapshot)):
        if named:
            raise UsageError(f"{snapshot.name} has a tokenizer of its own.", "Leave out --tokenizer.")
        return checkpoint
    if recorded is not None and named in (None, recorded.name):
        if recorded.kind == "folder" and named is None:
            raise SourceError(
                f"The tokenizer came from the local folder {recorded.name}.", "Say where it is with --tokenizer."
            )
        revision = recorded.revision if recorded.kind == "hub" else None
        return with_tokenizer(checkpoint, resolve_tokenizer(recorded.name, revision))
    if named is None and checkpoint.layout == "state-spaces":
        reporter.line(
            f"{snapshot.name} has no tokenizer, so it gets the usual one of its layout, {NEOX_TOKENIZER}."
        )
        named = NEOX_TOKENIZER
    return with_tokenizer(checkpoint, resolve_tokenizer(named)) if named else checkpoint


def is_tokenizer_code(snapshot: Snapshot) -> bool:
    """Whether a tokenizer has code of its own; stock transformers may silently use another instead.

    With a tokenizer.json beside it stock code loads that, which holds the whole tokenizer.
    """
    name = "tokenizer_config.json"
    if name not in snapshot.carried or "tokenizer.json" in snapshot.carried:
        return False
    auto_map = parse_json_object(snapshot.read(name), name).get("auto_map")
    return isinstance(auto_map, dict) and "AutoTokenizer" in auto_map


def refuse_gguf(checkpoint: Checkpoint) -> None:
    """Raise LayoutError for a model that stock transformers cannot run."""
    if checkpoint.layout == "gguf":
        raise LayoutError(
            f"{checkpoint.snapshot.name} is a GGUF model, which stock transformers does not run.",
            "Convert the original checkpoint, then write its scales into this one: mmod bake.",
        )


def is_loadable(checkpoint: Checkpoint) -> bool:
    """Whether stock transformers loads the source itself."""
    snapshot = checkpoint.snapshot
    return (
        checkpoint.layout == "transformers"
        and parse_json_object(snapshot.read("config.json"), "config.json").items() <= checkpoint.config.items()
        and all(name.endswith(".safetensors") for name in snapshot.weights)
        and checkpoint.tokenizer is None
        and all(tensor.name == tensor.info.name for tensor in checkpoint.tensors.values())
    )


def require_tokenizer(checkpoint: Checkpoint) -> None:
    """Raise SourceError if there is no tokenizer that stock code loads."""
    snapshot = checkpoint.snapshot
    if checkpoint.tokenizer is not None:
        return
    if is_tokenizer_code(snapshot):
        raise SourceError(
            f"The tokenizer of {snapshot.name} is code of its own, which is not run.",
            "Name one that gives the same tokens and has a tokenizer.json: --tokenizer.",
        )
    if not snapshot.has_tokenizer():
        raise SourceError(
            f"{snapshot.name} has no tokenizer, which reading a text takes.", "Name one: --tokenizer."
        )


def write_working_copy(checkpoint: Checkpoint, folder: Path, reporter: Reporter) -> Path:
    """A folder that stock transformers loads: the source itself, or an unscaled copy within ``folder``.

    Raises:
        SourceError: there is no tokenizer, without which no text can be read.
    """
    require_tokenizer(checkpoint)
    if is_loadable(checkpoint):
        return checkpoint.snapshot.folder
    working = folder / "working-copy"
    working.mkdir()
    bake(checkpoint, working, scales=None, reporter=reporter)
    return working


def load_stock(
    checkpoint: Checkpoint, folder: Path, request: ConvertRequest | MeasureRequest, reporter: Reporter, **how: Any
) -> StockModel:
    """Load the stock model in a folder as a request wants it; ``how`` is for ``calibrator.model.load_model``."""
    from calibrator.model import load_model, pick_device

    how |= {"allow_slow": request.allow_slow, "hub_kernels": request.hub_kernels, "reporter": reporter}
    return load_model(folder, tuple(checkpoint.A_log), device=pick_device(request.device), **how)


@dataclass(frozen=True)
class Opened:
    """A model ready to be measured."""

    snapshot: Snapshot
    checkpoint: Checkpoint
    stock: StockModel
    request: MeasureRequest
    reporter: Reporter

    def text(self, limit: int) -> Text:
        """The text to measure on, read as a conversion reads it, until ``limit`` tokens are there."""
        from calibrator.chosen_texts import read_as_one
        from calibrator.text import TextSource

        sources = [TextSource.parse(text) for text in self.request.text] or [TextSource(HELD_OUT_NOVEL)]
        return read_as_one(self.stock, sources, limit=limit, reporter=self.reporter)


@contextmanager
def open_model(
    model: str, request: MeasureRequest, reporter: Reporter, *, several: bool = False
) -> Iterator[Opened]:
    """Load a model; its recurrence, and the folder it was loaded from, stay open meanwhile.

    Args:
        several: it is one of several, so a tokenizer that was named is for those that have none.
    """
    snapshot = resolve(model, revision=request.revision, compose=True)
    checkpoint = read_checkpoint(snapshot, trust_a_log=request.trust_a_log)
    refuse_gguf(checkpoint)
    is_served = several and snapshot.has_tokenizer()
    checkpoint = add_tokenizer(checkpoint, None if is_served else request.tokenizer, reporter)
    with temporary_folder() as temporary:
        folder = write_working_copy(checkpoint, temporary, reporter)
        stock = load_stock(checkpoint, folder, request, reporter)
        with stock.recurrence:
            yield Opened(snapshot, checkpoint, stock, request, reporter)
