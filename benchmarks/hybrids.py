"""Tiny hybrids of attention and a recurrence, trained on short windows with stock classes, and measured far beyond.

    python -m benchmarks.hybrids tokens train.txt --tokenizer copy-mamba2-512 --out train.npy
    python -m benchmarks.hybrids train bamba --data train.npy --tokenizer copy-mamba2-512 \\
        --held-out northanger-abbey.txt --out bamba-512 --minutes 6
    python -m benchmarks.hybrids evaluate bamba-512 --text mansfield-park.txt --out bamba-512.json

Half of the rows are prose; the others are prose with facts planted and asked for, by ``calibrator.facts``. The
measures are perplexity and recall by length: as trained, on a sliding window, and with only one of the two kinds of
layers shut into windows, which says which of them fails.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.recall import read
from calibrator import recurrence
from calibrator.calibration import calibrate, prepare_calibration
from calibrator.evaluation import recall
from calibrator.evaluation.baselines import sliding_losses
from calibrator.evaluation.perplexity import prediction_losses
from calibrator.evaluation.recall import measure_recall
from calibrator.facts import NAMES, Fact, FactSource, plant, randint
from calibrator.kernels import kernel_functions
from calibrator.methods import METHODS
from calibrator.model import StockModel, device_name, load_model, load_tokenizer, pick_device
from calibrator.recurrence import DELTA_RULES, Recurrence
from calibrator.scaling import Scaling
from calibrator.settings import Settings
from converter.commands.opening import write_working_copy
from converter.layouts import read_checkpoint
from converter.lengths import parse_length
from converter.reporting import Reporter
from converter.source import resolve

WINDOW = 512
HEAD = 64
# The largest decay of one token that the chunks below can hold: sixteen of them stay inside float32.
FASTEST = -5.0
CHUNK = 16

_KINDS_OF_LAYERS = ["linear_attention", "linear_attention", "full_attention"] * 2


def _common(width: int) -> dict[str, Any]:
    return {
        "vocab_size": 4096,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": len(_KINDS_OF_LAYERS),
        "num_attention_heads": width // HEAD,
        "num_key_value_heads": width // HEAD,
        "max_position_embeddings": WINDOW,
        "tie_word_embeddings": True,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    }


def _mamba2(width: int) -> dict[str, Any]:
    # Eight heads, since the convolution's kernel asks for multiples of eight.
    return {
        "mamba_n_heads": 8,
        "mamba_d_head": width // 4,
        "mamba_d_state": 64,
        "mamba_chunk_size": 128,
    }


def _granite(width: int) -> dict[str, Any]:
    return {
        **_common(width),
        **_mamba2(width),
        "layer_types": _KINDS_OF_LAYERS,
        "shared_intermediate_size": 2 * width,
        "num_local_experts": 0,
        "position_embedding_type": "nope",
        "attention_multiplier": HEAD**-0.5,
    }


def _bamba(width: int) -> dict[str, Any]:
    attention = [layer for layer, kind in enumerate(_KINDS_OF_LAYERS) if kind == "full_attention"]
    return {**_common(width), **_mamba2(width), "attn_layer_indices": attention}


def _falcon_h1(width: int) -> dict[str, Any]:
    return {
        **_common(width),
        **_mamba2(width),
        "num_hidden_layers": 5,
        "mamba_d_ssm": 2 * width,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def _qwen(width: int) -> dict[str, Any]:
    return {
        **_common(width),
        "head_dim": HEAD,
        "layer_types": _KINDS_OF_LAYERS,
        "linear_key_head_dim": HEAD,
        "linear_value_head_dim": HEAD,
        "linear_num_key_heads": width // HEAD,
        "linear_num_value_heads": width // HEAD,
    }


def _kimi(width: int) -> dict[str, Any]:
    return {
        **_common(width),
        "layer_types": _KINDS_OF_LAYERS,
        "mlp_layer_types": ["dense"] * len(_KINDS_OF_LAYERS),
        "kv_lora_rank": HEAD,
        "qk_rope_head_dim": HEAD // 4,
        "qk_nope_head_dim": HEAD - HEAD // 4,
        "v_head_dim": HEAD,
        "linear_head_dim": HEAD,
        "linear_num_heads": width // HEAD,
    }


MODELS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "granite": ("granitemoehybrid", _granite),
    "bamba": ("bamba", _bamba),
    "falcon": ("falcon_h1", _falcon_h1),
    "qwen": ("qwen3_5_text", _qwen),
    "kimi": ("kimi_linear", _kimi),
}
"""By short name the model type and its settings for a width: attention without positions, with RoPE beside Mamba-2
layers, with RoPE inside them, gated delta net with RoPE, and Kimi's delta attention without positions."""


def build(name: str, width: int, seed: int) -> Any:
    """A random model whose decays are slow, so that windows of 512 never show it the states of long text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model_type, settings = MODELS[name]
    config = AutoConfig.for_model(model_type, **settings(width))
    with pick_device("auto"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    slowest, fastest = (0.01, 4.0) if model_type in ("qwen3_5_text", "kimi_linear") else (0.005, 0.5)
    with torch.no_grad():
        for module in _mixers(model).values():
            module.A_log.uniform_(math.log(slowest), math.log(fastest))
            step = torch.empty_like(module.dt_bias).uniform_(math.log(0.001), math.log(0.05)).exp()
            module.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
    return model


def _mixers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if "A_log" in module._parameters}


# --- The delta rule on a GPU without its own kernels -------------------------------------------------------------


def kimi_delta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Stock ``chunk_kimi_delta_attention`` by matrix products: tens of times faster.

    Decays of a token below exp(-5) count as exp(-5).
    """
    dtype, length = value.dtype, value.shape[1]
    if not use_qk_l2norm_in_kernel:
        raise NotImplementedError
    with torch.autocast(value.device.type, enabled=False):
        padding = -length % CHUNK
        query, key, value, g = (
            functional.pad(x.float().transpose(1, 2), (0, 0, 0, padding)).unflatten(2, (-1, CHUNK))
            for x in (query, key, value, g)
        )
        beta = functional.pad(beta.float().transpose(1, 2), (0, padding)).unflatten(2, (-1, CHUNK))[..., None]
        query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
        g = g.clamp(min=FASTEST).cumsum(-2)
        decayed, last = g.exp(), g[..., -1:, :]
        query = query * query.shape[-1] ** -0.5 * decayed
        written = (key * torch.exp(-g)).transpose(-1, -2)
        key_in = key * beta * decayed
        system, scores = (key_in @ written).tril(-1), (query @ written).tril()
        solved = torch.linalg.solve_triangular(
            system, torch.cat([value * beta, key_in], dim=-1), upper=False, unitriangular=True
        )
        values, reads = solved.split([value.shape[-1], key.shape[-1]], dim=-1)
        key_out = (key * torch.exp(last - g)).transpose(-1, -2)
        kept = last.exp().transpose(-1, -2)
        state = values.new_zeros(*values.shape[:2], key.shape[-1], values.shape[-1])
        state = state if initial_state is None else initial_state.float()
        outputs = []
        for q, w, v, a, k, d in zip(
            *(x.unbind(2) for x in (query, reads, values, scores, key_out, kept)), strict=True
        ):
            new = v - w @ state
            outputs.append(q @ state + a @ new)
            state = state * d + k @ new
        output = torch.stack(outputs, dim=2).flatten(2, 3)[:, :, :length]
    return output.transpose(1, 2).to(dtype), state if output_final_state else None


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(query: Tensor, *args: Any, **kw: Any) -> Any:
        with torch.autocast(query.device.type, enabled=False):
            return function(query, *args, **kw)

    return run


@contextmanager
def faster_delta_rule(model: nn.Module) -> Iterator[None]:
    """While open, delta rules run by matrix products in float32, as stock code has them under no autocast."""
    with ExitStack() as stack:
        for module in {sys.modules[type(layer).__module__] for layer in _mixers(model).values()}:
            for name in DELTA_RULES & vars(module).keys():
                stock = getattr(module, name)
                rule = kimi_delta if name == "chunk_kimi_delta_attention" else stock
                # Recurrences know the function by the plain one that it carries.
                rule = functools.wraps(inspect.unwrap(stock))(_in_float32(rule))
                stack.enter_context(patch.object(module, name, rule))
        yield


@contextmanager
def whole_windows() -> Iterator[None]:
    """While open, no text runs in pieces: layers that see windows alone hand on no state."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(StockModel, "tokens_at_once", 1 << 40))
        stack.enter_context(patch.object(recall, "SHORTEST_SHARED", 1 << 40))
        stack.enter_context(patch.object(recurrence, "MASK_VALUES", 1 << 80))
        yield


# --- Rows to train on --------------------------------------------------------------------------------------------

LIST = "list"
_DRESSES = (
    *((" ", ":", ";"), (" The ", " is", "."), (" [", "] =", ","), (" for", " take", "."), ("\n", " ->", "")),
    *((' "', '" means', "."), (" Item", " has", "."), (" (", ",", ")"), (" If", " then", ".")),
)
_PLACES = ("London", "Paris", "Rome", "Vienna", "Cairo", "Lisbon", "Madrid", "Athens", "Dublin", "Oslo", "Berlin")
# How often each kind is drawn, in rows of facts in words and in rows of spans.
WORDS = ("pass key", "1 pair", "1 pair", "4 pairs", "place", LIST)
SPANS = ("random span", "random span", "random span", "slice", "slice", LIST)


class TrainingFacts(FactSource):
    """The facts that are measured, and some more, so that a model learns to find rather than a template."""

    def draw(self, kind: str, generator: torch.Generator, *, varied: bool = False) -> Fact:
        """As the base class, and lists of keys and values in several dresses, and places by name."""
        if kind == "place":
            name, place = (words[randint(0, len(words) - 1, generator)] for words in (NAMES, _PLACES))
            said, asked = f" {name} lives in {place}.", f" Where does {name} live? {name} lives in"
            return Fact(self.encode(said), self.encode(asked), self.encode(f" {place}"))
        if kind != LIST:
            return super().draw(kind, generator, varied=varied)
        before, between, after = map(self.encode, _DRESSES[randint(0, len(_DRESSES) - 1, generator)])
        pairs = [
            tuple(self.random_tokens(randint(1, 3, generator), generator) for _ in range(2))
            for _ in range(randint(1, 6, generator))
        ]
        key, value = pairs[randint(0, len(pairs) - 1, generator)]
        text = torch.cat([part for k, v in pairs for part in (before, k, between, v, after)])
        return Fact(text, torch.cat([before, key, between]), value)


class Rows(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches without end: (rows, 512) token ids, and the weights of their loss.

    Args:
        progress: how much of the training is over, 0 to 1; facts are near at first.
    """

    def __init__(
        self, tokens: Path, tokenizer: Path, rows: int, seed: int, progress: Callable[[], float], weight: float
    ) -> None:
        self._tokens, self._tokenizer, self._rows = tokens, tokenizer, rows
        self._seed, self._progress, self._weight = seed, progress, weight

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info()
        generator = torch.Generator().manual_seed(self._seed * 1000 + (worker.id if worker else 0))
        stream = np.load(self._tokens, mmap_mode="r")
        starts = np.linspace(0, len(stream) - 8192, 64).astype(int)
        documents = [torch.from_numpy(stream[start : start + 8192].astype(np.int64)) for start in starts]
        source = TrainingFacts(documents, load_tokenizer(self._tokenizer))
        while True:
            made = [self._row(stream, source, generator) for _ in range(self._rows)]
            yield torch.stack([row for row, _ in made]), torch.stack([weights for _, weights in made])

    def _row(self, stream: Any, source: FactSource, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start = randint(0, len(stream) - WINDOW, generator)
        tokens = torch.from_numpy(stream[start : start + WINDOW].astype(np.int64))
        drawn = float(torch.rand((), generator=generator))
        answers = torch.zeros(WINDOW, dtype=torch.bool)
        if drawn < 0.1:
            tokens, answers = self._prompt(tokens, source, generator)
        elif drawn < 0.5:
            farthest = round(32 + 448 * min(1.0, self._progress() / 0.3))
            nearest = 4 if drawn < 0.35 else min(200, farthest // 2)
            tokens, answers = plant(
                tokens,
                source,
                WORDS if int(drawn * 1000) % 5 < 2 else SPANS,
                generator,
                every=(40, 70, 120)[randint(0, 2, generator)],
                farthest=farthest,
                nearest=nearest,
            )
        return tokens, 1 + (self._weight - 1) * answers

    def _prompt(self, tokens: Tensor, source: FactSource, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A row as a prompt is: an opening, one fact somewhere, its question at the very end."""
        kinds = ("pass key", "1 pair", "4 pairs", "random span")
        kind = kinds[randint(0, len(kinds) - 1, generator)]
        fact, opening = source.draw(kind, generator), source.opening(kind)
        end = WINDOW - fact.asking
        place = randint(len(opening), end - len(fact.text), generator)
        tokens = tokens.clone()
        tokens[: len(opening)] = opening
        tokens[place : place + len(fact.text)] = fact.text
        tokens[end:] = torch.cat([fact.question, fact.answer])
        answers = torch.arange(WINDOW) >= WINDOW - len(fact.answer)
        return tokens, answers


def read_paragraphs(path: Path) -> str:
    """A text with each paragraph in one line, an empty line between them."""
    text = path.read_text(encoding="utf-8")
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text))


def tokens(
    texts: list[Path],
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer.")],
    out: Annotated[Path, typer.Option(help="The .npy file to write.")],
) -> None:
    """Tokenise texts, whose documents are parted by form feeds, into one stream of 16-bit numbers."""
    documents = [part + "\n\n" for path in texts for part in path.read_text(encoding="utf-8").split("\f")]
    encoded = load_tokenizer(tokenizer)(documents, add_special_tokens=False)["input_ids"]
    stream = np.concatenate([np.array(ids, dtype=np.uint16) for ids in encoded])
    np.save(out, stream)
    print(f"{len(stream):,} tokens in {len(documents):,} documents", flush=True)


# --- Training ----------------------------------------------------------------------------------------------------


def train(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(MODELS)}.")],
    data: Annotated[Path, typer.Option(help="Stream of tokens.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer.")],
    held_out: Annotated[Path, typer.Option(help="Text to read the loss and recall on.")],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    minutes: Annotated[float, typer.Option(help="From the start of this process.")] = 6.0,
    rows: Annotated[int, typer.Option(help="Windows a step.")] = 64,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    width: Annotated[int, typer.Option(help="Hidden size.")] = 256,
    weight: Annotated[float, typer.Option(help="Of an answer's tokens in the loss.")] = 6.0,
    workers: Annotated[int, typer.Option(help="Processes that make rows; 0: this one.")] = 2,
    seed: int = 0,
    start: Annotated[Path | None, typer.Option(help="Checkpoint to go on from.")] = None,
    report_seconds: float = 60.0,
    save_seconds: float = 120.0,
) -> None:
    """Train one hybrid for so many minutes."""
    began = time.time()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    torch.set_float32_matmul_precision("high")
    device = pick_device("auto")
    model = build(name, width, seed)
    if start:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    model.to(device).train()
    for module in model.modules():
        # All ones. In float32 it would undo the autocast of what it multiplies.
        if isinstance(getattr(module, "mup_vector", None), Tensor) and device.type == "cuda":
            module.mup_vector = module.mup_vector.bfloat16()
    text_tokenizer = load_tokenizer(tokenizer)
    stock = StockModel(model, text_tokenizer, {}, {}, torch.float32, Recurrence(model, _mixers(model)))
    held = torch.tensor(text_tokenizer(read_paragraphs(held_out), add_special_tokens=False).input_ids)
    source = FactSource([held], text_tokenizer)
    matrices = [p for p in model.parameters() if p.ndim >= 2 and p.shape[0] > 1]
    others = [p for p in model.parameters() if not (p.ndim >= 2 and p.shape[0] > 1)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    ends = began + 60 * minutes
    span = [began + 30.0, ends]

    def progress() -> float:
        left = span[1] - time.time()
        return 1.0 if left <= 0 else max(0.0, 1 - left / (span[1] - span[0]))

    batches = iter(
        DataLoader(
            Rows(data, tokenizer, rows, seed + 1, progress, weight),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=device.type == "cuda",
        )
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {parameters / 1e6:.2f} M parameters on {device}", flush=True)

    def step(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        windows, weights = (part.to(device, non_blocking=True) for part in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden = stock.hidden_states(windows)
            scores = model.get_output_embeddings()(hidden[:, :-1])
        each = functional.cross_entropy(scores.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        loss = (each * weights).sum() / weights.sum()
        loss.backward()
        is_answer = weights > 1
        return loss.detach(), (each.detach() * is_answer).sum() / is_answer.sum().clamp(min=1)

    with faster_delta_rule(model):
        first = next(batches)
        _with_kernels_that_run(model, partial(step, first))
        optimiser.zero_grad(set_to_none=True)
        span[0] = time.time()
        reported = saved = span[0]
        print(f"{name}: first step after {span[0] - began:.0f} s", flush=True)
        count, kept = 0, [torch.zeros(2, device=device)]
        while (done := progress()) < 1:
            for group in optimiser.param_groups:
                group["lr"] = rate * max(0.02, min(1.0, done / 0.04)) * 0.5 * (1 + math.cos(math.pi * done))
            kept.append(torch.stack(step(next(batches))))
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            count += 1
            if count % 20 == 0 and device.type == "cuda":
                torch.cuda.synchronize()
            now = time.time()
            if now - reported > report_seconds:
                losses = torch.stack(kept[-100:]).mean(0).tolist()
                if not math.isfinite(losses[0]):
                    raise SystemExit(f"{name}: the loss is {losses[0]} after {count} steps")
                rate_now = count * rows * WINDOW / (now - span[0])
                print(
                    f"{name}: {done:.0%}, step {count}, {count * rows * WINDOW / 1e6:.0f} M tokens, "
                    f"{rate_now / 1e3:.0f} k/s, loss {losses[0]:.3f}, answers {losses[1]:.3f}, "
                    f"norm {float(norm):.2f}; {_standing(stock, held, source)}",
                    flush=True,
                )
                kept = kept[-1:]
                reported = time.time()
            if now - saved > save_seconds:
                save(model, text_tokenizer, out)
                saved = time.time()
        save(model, text_tokenizer, out)
        print(f"{name}: end, step {count}, {_standing(stock, held, source)}", flush=True)


def _with_kernels_that_run(model: Any, attempt: Callable[[], Any]) -> None:
    """Try one step; on an error without the fused kernel, then without any."""
    for means in ("without the fused kernel", "without kernels", ""):
        try:
            attempt()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return
        except Exception:
            if not means:
                raise
            traceback.print_exc()
            print(f"{model.config.model_type}: goes on {means}", flush=True)
        for mixer in _mixers(model).values():
            mixer.eval()
            if means == "without kernels":
                module = sys.modules[type(mixer).__module__]
                for name, function in kernel_functions(module).items():
                    setattr(module, name, function.__wrapped__)  # type: ignore[attr-defined]


@torch.no_grad()
def _standing(stock: StockModel, held: Tensor, source: FactSource) -> str:
    """Loss of held-out windows and share of facts found, in words."""
    with torch.autocast(stock.device.type, torch.bfloat16, enabled=stock.device.type == "cuda"):
        windows = held[: 32 * WINDOW].view(-1, WINDOW)
        loss = torch.cat([prediction_losses(stock, part) for part in windows.split(16)]).mean()
        kinds = ("pass key", "1 pair", "random span")
        cells = measure_recall(stock, source, kinds, {WINDOW: (64, 440)}, 32, 0, Reporter(), "")
    found = ", ".join(f"{cell.kind} at {cell.distance} {float(cell.right.mean()):.2f}" for cell in cells)
    return f"held-out perplexity {float(loss.exp()):.1f}, {found}"


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write a checkpoint in bfloat16, its A_log, D and dt_bias in float32, in place of the last one."""
    kept = copy.deepcopy(model).cpu().requires_grad_(False)
    for name, parameter in kept.named_parameters():
        if not name.endswith(("A_log", "dt_bias", ".D")):
            parameter.data = parameter.data.bfloat16()
    kept.config.dtype = torch.bfloat16
    fresh = out.with_name(f"{out.name}.new")
    kept.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)


# --- Measures ----------------------------------------------------------------------------------------------------


def _run_in_windows(forward: Callable[..., Any], window: int, *args: Any, **kw: Any) -> Any:
    """Run a layer as if every token saw the last half to whole window alone."""
    hidden = kw["hidden_states"] if "hidden_states" in kw else args[0]
    batch, length = hidden.shape[:2]
    if length <= window:
        return forward(*args, **kw)
    half = window // 2
    padding = -length % half

    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(cut, value))
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != length:
            if isinstance(value, Tensor) and value.ndim == 4:
                raise NotImplementedError("a mask over the whole text")
            return value
        value = value.expand(batch, *value.shape[1:])
        value = torch.cat([value, value[:, :padding]], dim=1)
        return value.unfold(1, window, half).movedim(-1, 2).flatten(0, 1)

    result = forward(*map(cut, args), **{name: cut(value) for name, value in kw.items()})
    outputs = (result[0] if isinstance(result, tuple) else result).unflatten(0, (batch, -1))
    joined = torch.cat([outputs[:, 0], outputs[:, 1:, half:].flatten(1, 2)], dim=1)[:, :length]
    return (joined, None) if isinstance(result, tuple) else joined


@contextmanager
def shut_in(model: nn.Module, kinds: str, window: int) -> Iterator[None]:
    """While open, the ``ssm`` or ``attention`` layers, or ``both``, see a window of tokens; else none."""
    recurrent = {
        name.removesuffix(".forget_gate"): module
        for name, module in model.named_modules()
        if "A_log" in module._parameters
    }
    modules = dict(model.named_modules())
    layers = [modules[name] for name in recurrent] if kinds in ("ssm", "both") else []
    if kinds in ("attention", "both"):
        layers += [m for name, m in modules.items() if name.endswith("self_attn") and name not in recurrent]
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(patch.object(layer, "forward", partial(_run_in_windows, layer.forward, window)))
        yield


VARIANTS = {
    "as trained": "none",
    "ssm in windows": "ssm",
    "attention in windows": "attention",
    "both in windows": "both",
}


@torch.no_grad()
def evaluate(
    models: list[Path],
    text: Annotated[Path, typer.Option(help="Text to read on.")],
    out: Annotated[Path, typer.Option(help="JSON file of the results.")],
    lengths: Annotated[str, typer.Option(help="Tokens.")] = "512,4k,16k,64k",
    facts: Annotated[str, typer.Option(help="Lengths at which facts are asked for.")] = "512,4k,16k",
    kinds: str = "pass key,1 pair,random span",
    variants: str = ",".join(VARIANTS),
    samples: Annotated[int, typer.Option(help="Prompts a cell up to 4k; a third beyond.")] = 48,
    dtype: str = "float32",
    windows: Annotated[int, typer.Option(help="Of the longest length.")] = 2,
    rope: Annotated[str, typer.Option(help="Extension of the positions, such as yarn:8.")] = "",
    calibrated_on: Annotated[str, typer.Option(help="Text to calibrate the scales on first.")] = "",
    target_len: Annotated[str, typer.Option(help="Length to calibrate for.")] = "16k",
    seconds: Annotated[float, typer.Option(help="No new measure is begun after so many.")] = 420.0,
) -> None:
    """Measure perplexity and recall of checkpoints by length, and write what there is after each measure."""
    began = time.time()
    results: list[dict[str, Any]] = []
    sizes, asked = ([parse_length(word) for word in words.split(",")] for words in (lengths, facts))
    for folder in models:
        checkpoint = read_checkpoint(resolve(str(folder)))
        with tempfile.TemporaryDirectory() as temporary:
            copied = write_working_copy(checkpoint, Path(temporary), Reporter())
            if rope:
                copied = shutil.copytree(copied, Path(temporary) / "extended")
                extend_positions(copied / "config.json", rope)
            stock = load_model(
                copied, checkpoint.A_log, device=pick_device("auto"), dtype=getattr(torch, dtype), allow_slow=True
            )
        ids = stock.tokenizer(read_paragraphs(text), add_special_tokens=False).input_ids
        span = torch.tensor(ids)[: windows * max(sizes)].view(windows, -1)
        source = FactSource([torch.tensor(ids)], stock.tokenizer)
        result: dict[str, Any] = {"model": folder.name, "device": device_name(stock), "dtype": dtype}
        result["variants"] = {}
        results.append(result)

        def keep(where: dict[str, Any], name: str, measure: Callable[[], Any], who: str) -> None:
            if time.time() - began > seconds:
                print(f"{who}: {name} left out, no time", flush=True)
                return
            try:
                where[name] = measure()
            except (torch.cuda.OutOfMemoryError, NotImplementedError) as error:
                where[name] = f"{type(error).__name__}: {str(error)[:200]}"
            print(f"{time.time() - began:.0f} s {who}: {name} {where[name]}", flush=True)
            out.write_text(json.dumps(results, indent=1) + "\n")

        scaling: Any = nullcontext()
        scales = None
        if calibrated_on:
            with faster_delta_rule(stock.model), torch.enable_grad():
                scaling, scales, result["calibration"] = _calibrated(
                    stock, calibrated_on, parse_length(target_len), f"{folder.name} {rope}"
                )
            print(f"{time.time() - began:.0f} s {folder.name}: {result['calibration']}", flush=True)
        with faster_delta_rule(stock.model), scaling, stock.recurrence:
            if scales:
                scaling.load(scales)
            sliding: dict[str, Any] = {}
            result["sliding"] = sliding
            keep(
                sliding,
                "perplexity",
                partial(_sliding_perplexity, stock, span),
                f"{folder.name}, sliding",
            )
            for measure in MEASURES:
                for variant in variants.split(","):
                    where = result["variants"].setdefault(variant, {})
                    for size in sizes if measure is _perplexity else asked:
                        pieces = nullcontext() if VARIANTS[variant] == "none" else whole_windows()
                        with shut_in(stock.model, VARIANTS[variant], WINDOW), pieces:
                            argument = span if measure is _perplexity else (source, kinds.split(","), samples)
                            name = f"{MEASURES[measure]} {size}"
                            keep(where, name, partial(measure, stock, argument, size), f"{folder.name}, {variant}")


def extend_positions(config: Path, rope: str) -> None:
    """Extend a config's rotary positions as its users would, by ``TYPE:FACTOR``."""
    kind, _, factor = rope.partition(":")
    settings = json.loads(config.read_text())
    settings["rope_parameters"] |= {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        settings["rope_parameters"]["original_max_position_embeddings"] = WINDOW
    settings["max_position_embeddings"] = int(WINDOW * float(factor))
    config.write_text(json.dumps(settings))


def _calibrated(stock: StockModel, text: str, target_len: int, who: str) -> tuple[Scaling, Any, dict[str, Any]]:
    """The scales of today's default, and what the calibration said."""
    granularity = METHODS["gradient"].granularity(tuple(next(iter(stock.A_log.values())).shape))
    settings = Settings("gradient", granularity, "linear", WINDOW, target_len)
    problem = prepare_calibration(stock, [read(stock, text)], settings, Reporter(), who)
    outcome = calibrate(problem)
    problem.journal.remove()
    said = {
        "granularity": granularity,
        "seconds": round(outcome.record.seconds, 1),
        "kept_step": outcome.record.kept_step,
        "sentences": [outcome.skills, *outcome.sentences()],
        "history": outcome.record.history,
    }
    scaling = Scaling(stock.mixers, stock.A_log, granularity, "linear")
    return scaling, outcome.scales, said


def _perplexity(stock: StockModel, span: Tensor, size: int) -> float:
    return float(prediction_losses(stock, span.reshape(-1, size)).mean().exp())


def _sliding_perplexity(stock: StockModel, span: Tensor) -> float:
    return float(sliding_losses(stock, span, WINDOW).mean().exp())


def _recall(stock: StockModel, asked: tuple[FactSource, list[str], int], size: int) -> dict[str, float]:
    source, kinds, samples = asked
    distances = [d for d in (64, 250, 440, 1000, 2000, 3800, 8000) if d < size - 48]
    if size > 8 * WINDOW:
        distances = [d for d in distances if d in (64, 440, 1000, 3800, 8000)]
    count = samples if size <= 8 * WINDOW else max(1, samples // 3)
    cells = measure_recall(stock, source, kinds, {size: distances}, count, 1, Reporter(), "")
    return {f"{cell.kind} at {cell.distance}": round(float(cell.right.mean()), 3) for cell in cells}


MEASURES: dict[Callable[..., Any], str] = {_perplexity: "perplexity", _recall: "recall"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(tokens)
app.command()(train)
app.command()(evaluate)

if __name__ == "__main__":
    app()
