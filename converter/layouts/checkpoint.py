"""A checkpoint as its converted copy will spell it: config, weight files, tensors in order, and which are A_log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from converter.errors import LayoutError
from converter.layouts.config_values import section
from converter.safetensors_file import FLOATS, TORCH_NAMES, Index, TensorInfo, to_float64
from converter.shards import Shard, read_bytes
from converter.source import Snapshot, Tokenizer

Layout = Literal["state-spaces", "transformers", "gguf"]

TRANSFORMERS_EMBEDDING = "backbone.embeddings.weight"


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
        name: in the transformers layout's files.
        info: name in the source's file, number format and shape.
        shard: the source's file with its bytes.
    """

    name: str
    info: TensorInfo
    shard: Shard = field(repr=False)

    @property
    def dtype(self) -> str:
        """Number format, as safetensors names it."""
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each axis."""
        return self.info.shape

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.info.nbytes

    def require_float(self) -> None:
        """Raise LayoutError unless the tensor has a floating-point format that A_log can have."""
        if self.dtype not in FLOATS:
            raise LayoutError(
                f"{self.info.name} is stored as {self.dtype}, which cannot be scaled.",
                f"It must be one of {', '.join(FLOATS)}; use the checkpoint before it was quantised.",
            )

    def read(self) -> NDArray[np.float64]:
        """The values, exact in float64.

        Raises:
            LayoutError: the tensor has no floating-point format that A_log can have, or holds NaN or infinity.
        """
        self.require_float()
        values = to_float64(read_bytes(self.shard, self.info), self.dtype).reshape(self.shape)
        if not np.isfinite(values).all():
            raise LayoutError(
                f"{self.info.name} holds NaN or infinity.", "The checkpoint is damaged; get another copy."
            )
        return values

    def equals(self, other: Tensor) -> bool:
        """Whether format, shape and every byte are the same."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        pieces = zip(self.shard.chunks(self.info), other.shard.chunks(other.info), strict=True)
        return all(np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)) for a, b in pieces)


@dataclass(frozen=True)
class WeightFile:
    """One weight file of the converted copy: its name there, and the tensors it takes from one source file."""

    name: str
    shard: Shard
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A recognised checkpoint.

    Attributes:
        layout: of the source.
        model_type: transformers' name of the architecture (of the text part in a vision model).
        config: config.json of the transformers layout, as it will be written; of a GGUF model the named values of
            its header.
        files: weight files of the converted copy, with the source's shard structure.
        index: the source's index, or None if the weights are one file.
        A_log: name to tensor, in the order of the layers; of a GGUF model ``ssm_a``, which is -exp(A_log).
        attention_layers: numbers of the layers with attention, which no scale touches.
        tied_head: ``lm_head.weight`` of a state-spaces source, left out because it is the embedding again.
        load_dtype: dtype in which stock transformers loads the weights by default (``bfloat16``).
        tokenizer: what is added to the copy, where the source has none; see ``with_tokenizer``.
        target_len: tokens to which the ``model_max_length`` of the copy's tokenizer is raised.
        entries: what the copy rewrites of config.json, or of a GGUF header; see :mod:`converter.served_length`.
    """

    snapshot: Snapshot
    layout: Layout
    model_type: str
    config: Mapping[str, Any]
    files: tuple[WeightFile, ...]
    index: Index | None
    A_log: Mapping[str, Tensor]
    attention_layers: tuple[int, ...]
    tied_head: Tensor | None
    load_dtype: str
    tokenizer: Tokenizer | None = None
    target_len: int | None = None
    entries: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by its name in the converted copy, in the order of the files."""
        return {tensor.name: tensor for file in self.files for tensor in file.tensors}

    @property
    def quantisation(self) -> str:
        """``gguf``, ``mlx``, or the name that a quantiser left in config.json; empty for plain weights."""
        if self.layout == "gguf":
            return "gguf"
        if any(file.shard.metadata.get("format") == "mlx" for file in self.files):
            return "mlx"
        named = section(self.config, "quantization_config").get("quant_method")
        beside = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
        found = [kind for path, kind in beside.items() if path in self.snapshot.carried]
        return named if isinstance(named, str) else next(iter(found), "")

    @property
    def load_format(self) -> str:
        """``load_dtype`` as safetensors names it (``BF16``)."""
        return next(dtype for dtype, name in TORCH_NAMES.items() if name == self.load_dtype)

    def check_values(self) -> None:
        """Check values that a header does not show, before anything slow.

        Raises:
            LayoutError: an A_log holds NaN or infinity, or a tied head is not the embedding.
        """
        for tensor in self.A_log.values():
            tensor.read()
        if self.tied_head is not None and not self.tied_head.equals(self.tensors[TRANSFORMERS_EMBEDDING]):
            raise LayoutError(
                "config.json ties lm_head to the embedding, but the two differ in the file.",
                'Set "tie_embeddings": false in config.json if the head is meant to be its own.',
            )

    def total_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
