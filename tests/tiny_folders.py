"""Tiny random models on the disk, each with a tokenizer of single bytes, for tests that run the real command."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from converter.manifest import Manifest, SourceRecord
from tests.tiny_models import VOCABULARY, tiny_model

NOVEL = Path(__file__).parent.parent / "converter" / "demo" / "texts" / "persuasion.txt"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, which fits the tiny models' vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == VOCABULARY
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny_folder(model_type: str, folder: Path, shard_size: str = "50GB") -> Path:
    """A tiny model of an architecture as ``save_pretrained`` writes it, and its tokenizer."""
    tiny_model(model_type).save_pretrained(folder, max_shard_size=shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


def novel(folder: Path, letters: int) -> Path:
    """The start of a bundled novel as a file of its own."""
    path = folder / "novel.txt"
    path.write_text(NOVEL.read_text()[:letters].encode("ascii", "ignore").decode())
    return path


def bare_manifest(source: SourceRecord) -> Manifest:
    """The manifest of a conversion that changed nothing and measured nothing."""
    return Manifest(
        source=source,
        form="linear",
        granularity="layer",
        load_dtype="bfloat16",
        changed=[],
        identical_tensors=0,
        texts=[],
        calibration=None,
        perplexity=None,
        versions={},
        command="",
    )
