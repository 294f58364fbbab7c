"""Loads a stock transformers model for calibration: its A_log, its device and its kernels."""

from __future__ import annotations

import codecs
import copy
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, nn

from calibrator.carried_state import State
from calibrator.kernels import add_hub_kernels, missing_kernels, packages_of, refused_shape, require_kernels
from calibrator.quantised import REMEDY, let_gradients_through
from calibrator.recurrence import Recurrence
from calibrator.weight_stream import MemoryMode, WeightStream, is_streamed
from converter.errors import CalibrationError, LayoutError, UsageError, boundary
from converter.reporting import SILENT, Reporter
from converter.safetensors_file import parse_index
from converter.scales import layer_number, same_layers

DAMAGED = "The checkpoint is damaged; get another copy."
_ROTARY = ("inv_freq", "attention_scaling")
Positions: TypeAlias = tuple[Any, Mapping[str, Any]]
_CPU_TOKENS, _GPU_TOKENS = 2048, 8192
# Without a word on a model's own code transformers asks on the terminal whether to run it.
_ONLY_HERE: Any = {"local_files_only": True, "trust_remote_code": False}


@dataclass
class StockModel:
    """A frozen stock model, its tokenizer and its recurrences.

    Attributes:
        model: as ``AutoModelForCausalLM`` loaded it, in evaluation mode, no parameter asking for a gradient.
        tokenizer: as ``AutoTokenizer`` loaded it.
        mixers: name of each A_log in the checkpoint's files to the module that holds it.
        A_log: the same names to the files' values, float32, on the model's device.
        load_dtype: the dtype that stock transformers loads the weights in by default.
        recurrence: open while the model is in use.
        rope: the entry of config.json for rotary positions that were extended; empty if none were.
        published_positions: rotary embeddings that were extended, and their frequencies and scaling before.
        weights: of the layers, where they come from host memory.
    """

    model: Any
    tokenizer: Any
    mixers: Mapping[str, nn.Module]
    A_log: Mapping[str, Tensor]
    load_dtype: torch.dtype
    recurrence: Recurrence = field(repr=False)
    rope: Mapping[str, Any] = field(default_factory=dict)
    published_positions: Sequence[Positions] = ()
    weights: WeightStream | None = None

    def extend_positions(self, rope: Mapping[str, Any]) -> None:
        """Run with rotary positions as an entry of config.json would declare them; with the source's own for none.

        Raises:
            CalibrationError: there are none.
        """
        own = _positions(self.model)
        if not own:
            raise CalibrationError(
                "Stock transformers' model has no rotary positions to extend.", "Leave out --rope."
            )
        self.rope, self.published_positions = rope, self.published_positions or own
        config = copy.deepcopy(self.model.config.get_text_config())
        config.rope_parameters = {**config.rope_parameters, **next(iter(rope.values()), {})}
        for rotary, _ in own:
            [(_, values)] = _positions(type(rotary)(config).to(rotary.inv_freq.device))
            _assign([(rotary, values)])

    @contextmanager
    def as_published(self) -> Iterator[None]:
        """While open, rotary positions that were extended are the source's own."""
        own = _positions(self.model)
        try:
            _assign(self.published_positions)
            yield
        finally:
            _assign(own)

    @property
    def device(self) -> torch.device:
        """Where the input tokens go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype_name(self) -> str:
        """The dtype that it runs in, such as ``bfloat16``."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def vocab_size(self) -> int:
        """Rows of the output projection."""
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def rows(self) -> int:
        """Rows of the embedding: a token's id must be less."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def is_quantised(self) -> bool:
        """Whether some layers are a quantiser's."""
        return getattr(self.model, "hf_quantizer", None) is not None

    @property
    def tokens_at_once(self) -> int:
        """Tokens of a forward pass; more take more memory, and on CPU more time too."""
        return _CPU_TOKENS if self.device.type == "cpu" else _GPU_TOKENS

    def tokens_of_piece(self, texts: int, length: int) -> int:
        """Tokens of each of some texts, side by side, that a piece of them has on its way to a length."""
        return self.recurrence.longest_piece(max(1, self.tokens_at_once // texts), texts * length)

    def batches(self, windows: Tensor) -> tuple[Tensor, ...]:
        """Windows (count, length) in parts for a forward pass each."""
        return windows.split(max(1, self.tokens_at_once // windows.shape[1]))

    def in_pieces(
        self, tokens: Tensor, size: int, state: State | None = None, keep: int | None = None
    ) -> Iterator[tuple[Tensor, State]]:
        """Run texts (batch, length) in pieces of ``size`` tokens that carry their state.

        Args:
            state: where the texts go on from; None for zero state.
            keep: tokens whose keys attention keeps; None for all.

        Yields:
            Hidden states of a piece, (batch, tokens, hidden_size), and the state after it.
        """
        for start in range(0, tokens.shape[1], size):
            with self.recurrence.carried(state, keep) as state:
                hidden = self.hidden_states(self.place(tokens[:, start : start + size]))
            yield hidden, state

    def place(self, tokens: Tensor) -> Tensor:
        """Tokens on the model's device, copied without waiting for the device."""
        if self.device.type == "cpu":
            return tokens
        return tokens.pin_memory().to(self.device, non_blocking=True)

    def release(self) -> None:
        """Free the weights, wherever they are kept; the model cannot run any more."""
        if self.weights:
            self.weights.close()
        for module in list(self.model.modules()):
            vars(module).clear()

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Run windows from zero state.

        Args:
            tokens: (batch, length) token ids on the model's device.

        Returns:
            (batch, length, hidden_size), what the output projection takes.

        Raises:
            CalibrationError: more tokens than the kernels can count.
        """
        if tokens.shape[1] > self.recurrence.longest_pass:
            raise CalibrationError(
                f"A pass over {tokens.shape[1]:,} tokens is too long for the Mamba-2 kernels, which count "
                f"a layer's values in 32 bits: {self.recurrence.longest_pass:,} tokens of this model at most.",
                "Choose shorter lengths.",
            )
        hidden: Tensor = self.model.base_model(tokens, use_cache=False).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states (…, hidden_size) to float32 scores (…, vocab_size)."""
        head = self.model.get_output_embeddings()
        scores: Tensor = head(hidden.to(head.weight.dtype)).float()
        return scores


def _positions(model: nn.Module) -> list[Positions]:
    """The rotary embeddings of a model, each with its frequencies and its scaling."""
    found: list[Any] = [module for module in model.modules() if all(hasattr(module, name) for name in _ROTARY)]
    return [(module, {name: getattr(module, name) for name in _ROTARY}) for module in found]


def _assign(positions: Iterable[Positions]) -> None:
    """Give rotary embeddings their frequencies and their scaling."""
    for rotary, values in positions:
        for name, value in values.items():
            # A buffer stays one.
            setattr(rotary, name, value)


def device_name(stock: StockModel) -> str:
    """What the model runs on, for the manifest: ``cpu``, or the name of the GPU."""
    return torch.cuda.get_device_name(stock.device) if stock.device.type == "cuda" else stock.device.type


def pick_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that is there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:
        raise CalibrationError(
            f"The device {name} cannot be used: {_first_line(error)}", "Try --device cpu."
        ) from error
    return device


def load_model(
    folder: Path,
    keys: Iterable[str],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    allow_slow: bool = False,
    hub_kernels: bool = False,
    memory: MemoryMode = "auto",
    reporter: Reporter = SILENT,
) -> StockModel:
    """Load a checkpoint in the transformers layout with stock transformers.

    Args:
        folder: the checkpoint; nothing outside it is read.
        keys: names of its A_log tensors, as its files spell them.
        device: where the model runs.
        dtype: of the weights; by default float32 on CPU, and the checkpoint's own elsewhere or if it is quantised.
        allow_slow: run on a GPU without the kernels.
        hub_kernels: take missing ones from the Hub without asking.
        memory: ``stream`` keeps the layers' weights in host memory; ``auto`` does where they do not fit on the GPU.
        reporter: told which kernels there are.

    Raises:
        CalibrationError: stock transformers cannot run it here.
        LayoutError: weights are missing or left over, or the model's A_log are not the files'.
    """
    # So that Triton tunes a kernel once for a machine and not once for a process; read by Triton 3.4 and later.
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    from transformers import AutoModelForCausalLM

    fix = "Its architecture must be one of stock transformers; its own code is not run."
    config = load_config(folder, "this checkpoint", fix)
    modeling = _modeling_file(config) if device.type != "cpu" else None
    if getattr(config.get_text_config(), "ple_layer_ids", None):
        raise CalibrationError("n-gram embeddings (ple_layer_ids) cannot be run in pieces of a text.", "")
    packages = packages_of(modeling) if modeling else set()
    if not allow_slow:
        if modeling and (missing := missing_kernels(packages)):
            add_hub_kernels(modeling, missing, hub_kernels, reporter)
        require_kernels(packages, device, reporter)
    load_dtype = getattr(config.get_text_config(), "dtype", None) or torch.float32
    is_quantised = hasattr(config, "quantization_config")
    if is_quantised and config.quantization_config.get("format") == "pack-quantized":
        # Stock Mamba initialises `out_proj.weight`, which packed layers lack, and layers have if they are unpacked
        # while they load. No rounding is lost: in this format only weights are rounded.
        config.quantization_config["dequantize"] = True
    if memory == "stream" and is_quantised:
        raise UsageError("--memory stream takes plain weights, and these are quantised.", "Leave out --memory.")
    if dtype is None:
        # The layers of a quantiser answer in the checkpoint's dtype, whatever the others are loaded in.
        dtype = torch.float32 if device.type == "cpu" and not is_quantised else load_dtype
    with refusals("this checkpoint", ""):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, **_ONLY_HERE
        )
        model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[kind])):
            raise LayoutError(f"Stock transformers reports {kind.replace('_', ' ')}: {', '.join(names[:5])}.")
    model.requires_grad_(False).eval()
    require_finite(model)
    weights = None
    if not is_quantised and is_streamed(model, device, memory):
        weights = WeightStream(model, device)
    else:
        model.to(device)
    if is_quantised:
        # compressed-tensors unpacks its weights when the whole model runs first; measures run the backbone alone.
        unable = boundary("Stock transformers cannot run this quantised checkpoint", CalibrationError, REMEDY)
        with torch.no_grad(), unable:
            model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
        let_gradients_through(model)
    mixers = find_mixers(model, keys)
    refused = refused_shape(mixers) if packages else ""
    if refused and not allow_slow:
        raise CalibrationError(f"{refused}.", "Run it without the kernels: --device cpu or --allow-slow.")
    tokenizer = load_tokenizer(folder)
    A_log = {key: value.to(device) for key, value in read_A_log(folder, mixers).items()}
    has_kernels = bool(packages) and not refused and not missing_kernels(packages)
    recurrence = Recurrence(model, mixers, has_kernels)
    return StockModel(model, tokenizer, mixers, A_log, load_dtype, recurrence, weights=weights)


def require_finite(model: nn.Module) -> None:
    """Raise CalibrationError for the first weight that holds NaN or infinity, which every prediction would be."""
    for name, values in model.named_parameters():
        # Formats of one byte are a quantiser's, which torch does not compare.
        has_range = values.is_floating_point() and values.itemsize > 1 and values.numel()
        if has_range and not torch.stack(values.aminmax()).isfinite().all():
            raise CalibrationError(f"The weight {name} holds NaN or infinity.", DAMAGED)


def load_config(folder: Path, what: str, fix: str) -> Any:
    """The config of a folder, as stock transformers loads it, silent from now on. Raises CalibrationError."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with refusals(what, fix):
        return AutoConfig.from_pretrained(folder, **_ONLY_HERE)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, as stock transformers loads it. Raises CalibrationError."""
    from transformers import AutoTokenizer

    marked = [path.name for path in sorted(folder.glob("*.json")) if _begins_with_mark(path)]
    fix = f"Save {', '.join(marked)} without a byte order mark." if marked else ""
    fix = fix or "Its files may be damaged, or of a newer transformers."
    with refusals("the tokenizer beside this checkpoint", fix):
        tokenizer = AutoTokenizer.from_pretrained(folder, **_ONLY_HERE)
        # Some of its config is read only now.
        tokenizer("a")
        return tokenizer


def _begins_with_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(3) == codecs.BOM_UTF8


@contextmanager
def refusals(what: str, fix: str) -> Iterator[None]:
    """Turn errors of stock transformers while it loads files into a CalibrationError."""
    try:
        yield
    except Exception as error:
        # Of any kind: tokenizers raises plain Exceptions, and a config of another version gives KeyErrors.
        raise CalibrationError(f"Stock transformers cannot load {what}: {_first_line(error)}", fix) from error


def _first_line(error: BaseException) -> str:
    """The first line of an error, with the next where it ends in a colon; what follows is for programmers."""
    lines = [*str(error).splitlines(), "", ""]
    return " ".join(lines[: 1 + lines[0].endswith(":")]) or type(error).__name__


def _modeling_file(config: Any) -> ModuleType | None:
    """The file with the stock model of a configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    return sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__]


def find_mixers(model: nn.Module, keys: Iterable[str]) -> dict[str, nn.Module]:
    """Match the A_log names in the files to modules by layer number, since some in-memory names differ.

    Raises:
        LayoutError: the model in memory has other layers with an A_log than the files.
    """
    modules = {
        f"{name}.A_log": module
        for name, module in model.named_modules()
        if "A_log" in module._parameters and module._parameters["A_log"] is not None
    }
    keys = list(keys)
    if (names := same_layers(keys, modules)) is None:
        found, expected = ([layer_number(name) for name in part] for part in (keys, modules))
        raise LayoutError(f"The files hold A_log for layers {found}, stock transformers for {expected}.")
    return {key: modules[name] for key, name in names.items()}


def read_A_log(folder: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """The A_log tensors of the safetensors files that transformers loads from a folder, as float32."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    wanted = set(keys)
    found: dict[str, Tensor] = {}
    # Whole weights before sharded ones, as transformers 5.23 chooses; other weights may lie beside them.
    files: Collection[str] = [SAFE_WEIGHTS_NAME]
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        files = parse_index((folder / SAFE_WEIGHTS_INDEX_NAME).read_bytes(), SAFE_WEIGHTS_INDEX_NAME).files
    for name in files:
        with safe_open(folder / name, framework="pt") as file:
            found |= {key: file.get_tensor(key).float() for key in wanted & set(file.keys())}
    return found
