"""Replaces the scan and convolution functions of stock modules while it is open, and puts them back.

Stock code cannot do three things that a calibration needs: start a scan from the state of the text before (with its
derivative by A), run other time steps Δ, and run Mamba-1 on a CPU in usable time. Stock modeling files call their
scan and convolution by module-level names, so :class:`Recurrence` replaces those names; modules and weights stay as
they are. When it closes, the names hold the same function objects as before, and a forward pass gives the same bits
(``tests/test_recurrence.py`` checks both). Attention is given the keys of the text before in a stock cache.

On a GPU it sets the mixers' training flag, since stock code calls the fused kernels, which take less time and
memory, in training mode only. Nothing else in the mixers depends on it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import TracebackType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibrator import kernel_scan
from calibrator.carried_state import Carry, State
from calibrator.kept_keys import CACHE
from calibrator.kernels import kernel_functions
from converter.errors import CalibrationError, boundary

SELECTIVE_SCAN = "mamba_selective_scan"
CHUNK_SCAN = "mamba2_chunk_scan"
FUSED_MIXER = "mamba2_split_conv1d_scan_combined"
FUSED_SELECTIVE_MIXER = "mamba_inner_fn"
DELTA_RULES = {"torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention"}
CONVOLUTION = "causal_conv1d_fn"
CPU_CHUNK = 64
# A raw time step whose softplus is zero: a token that leaves the state as it is.
NO_STEP = -1e4
# Of a mask of attention, of one byte and, in the kernel, two more or four.
MASK_VALUES = 1 << 30
# Tokens whose tangents are held at once.
DELTA_TOKENS = 512


Steps = Callable[[str, Tensor], Tensor]
"""Takes the name of an A_log and Δ (batch, length, channels or heads) after its softplus; returns the Δ to run."""


class Recurrence:
    """Runs the mixers of one model on compiled code, with or without a carried state.

    Args:
        model: a stock causal language model.
        mixers: name of an A_log tensor to the module that holds it.
        kernels: call the kernels that stock code found rather than its plain torch functions; by default
            everywhere but on CPU, where they crash.

    Attributes:
        longest_pass: tokens that one pass may hold.
        has_attention: whether the model is a hybrid.
    """

    def __init__(self, model: Any, mixers: Mapping[str, nn.Module], kernels: bool | None = None) -> None:
        self._model = model
        self._mixers = mixers
        self._attention = [module for module in model.modules() if getattr(module, "is_causal", False)]
        self.has_attention = bool(self._attention)
        self._module_of = {
            key: sys.modules[inspect.unwrap(type(mixer).forward).__module__] for key, mixer in mixers.items()
        }
        is_cpu = next(next(iter(mixers.values())).parameters()).device.type == "cpu"
        self._kernels = not is_cpu if kernels is None else kernels
        self._on_cpu = is_cpu and not self._kernels
        # The Mamba-2 kernels count the values of ``in_proj`` in 32 bits: at 2^31 a pass ends in an illegal memory
        # access (``benchmarks/long_kernels.py``). Mamba-1's have no such limit.
        projections = [getattr(mixer, "in_proj", None) for mixer in mixers.values() if mixer.A_log.ndim == 1]
        widths = [layer.out_features for layer in projections if self._kernels and isinstance(layer, nn.Linear)]
        self.longest_pass = (2**31 - 1) // max(widths, default=1)
        self._stack = ExitStack()
        self._depth = 0
        self._carry = Carry(model.config.get_text_config() if self.has_attention else None)
        self._steps: Steps | None = None

    def __enter__(self) -> Recurrence:
        """Opens it, or keeps it open. Raises CalibrationError if the scan for the CPU cannot be compiled."""
        self._depth += 1
        if self._depth > 1:
            return self
        for module in set(self._module_of.values()):
            found = kernel_functions(module)
            if not found:
                # Nothing could be replaced, and a carried state would be lost without a word.
                raise CalibrationError(
                    f"The scans of {module.__name__} are not found.", "Use transformers 5.23 or 5.24."
                )
            plain = {name: inspect.unwrap(function) for name, function in found.items()}
            kernels = {name: partial(_on_its_gpu, function) for name, function in found.items()}
            functions = kernels if self._kernels else plain
            replaced = functions | self._replacements(functions, plain)
            for name, function in replaced.items():
                self._stack.enter_context(patch.object(module, name, function))
        if self.has_attention:
            self._hook(self._model.base_model, self._enter_model)
        for module in self._attention:
            self._hook(module, self._enter_attention)
        for key, mixer in self._mixers.items():
            self._hook(_with_its_convolution(self._model, mixer), partial(self._enter_layer, key))
            if self._kernels:
                self._stack.enter_context(patch.object(mixer, "training", True))
            chunk = getattr(mixer, "chunk_size", None)
            if self._on_cpu and isinstance(chunk, int):
                # The result does not depend on the chunk; stock code's cost on CPU grows with it.
                self._stack.enter_context(patch.object(mixer, "chunk_size", min(chunk, CPU_CHUNK)))
        return self

    def _replacements(
        self, stock: Mapping[str, Callable[..., Any]], plain: Mapping[str, Callable[..., Any]]
    ) -> dict[str, Callable[..., Any]]:
        """The functions that replace stock ones for a carried state, changed steps or the CPU."""
        single: Mapping[str, Callable[..., Any]] = {
            CHUNK_SCAN: self._chunk_scan,
            CONVOLUTION: self._convolution,
            FUSED_SELECTIVE_MIXER: self._fused_selective_mixer,
        }
        replacements: dict[str, Callable[..., Any]] = {
            name: partial(function, stock[name]) for name, function in single.items() if name in stock
        }
        if SELECTIVE_SCAN in stock:
            kernel = stock[SELECTIVE_SCAN]
            scan = _scan_for_cpu() if self._on_cpu else partial(kernel_scan.selective_scan, kernel)
            replacements[SELECTIVE_SCAN] = partial(self._selective_scan, kernel, scan)
        if FUSED_MIXER in stock:
            replacements[FUSED_MIXER] = partial(self._fused_mixer, stock[FUSED_MIXER], stock[CONVOLUTION])
        for name in stock.keys() & DELTA_RULES:
            replacements[name] = partial(self._delta_rule, stock[name], plain[name])
        return replacements

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._stack.close()

    def longest_piece(self, piece: int, keys: int) -> int:
        """The longest piece up to ``piece``, of whose every token by ``keys`` stock attention can have a mask."""
        return min(piece, max(1, MASK_VALUES // keys)) if self.has_attention else piece

    def piece_and_keys(self, piece: int, attention_window: int | None) -> tuple[int, int | None]:
        """The longest piece up to ``piece``, and how many keys to keep, for attention to see a window at most.

        It is a half of the window at most, so that every token but the first ones sees half of it or more.
        """
        if attention_window is None or not self.has_attention:
            return piece, None
        piece = min(self.longest_piece(piece, attention_window), max(1, attention_window // 2))
        return piece, attention_window - piece

    def carried(self, before: State | None, keep: int | None = None) -> AbstractContextManager[State]:
        """While open, forward (and backward) passes run one piece of a text from the state ``before`` it.

        Args:
            before: state of every layer at the end of the last piece; None or empty for the first.
            keep: tokens at the end of the piece, and before it, whose keys attention keeps; None for all. No
                gradient flows through keys of earlier pieces.

        Returns:
            A context that gives the state after the piece, filled in by the forward pass.
        """
        return self._carry.piece(before, keep)

    def stepping(self, steps: Steps) -> AbstractContextManager[Any]:
        """While open, the time step Δ of every layer passes through ``steps`` on its way to the scan."""
        return patch.object(self, "_steps", steps)

    def _hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _enter_model(self, _model: nn.Module, args: Any, kw: dict[str, Any]) -> Any:
        """Tell stock code of the text before the piece, from which it makes masks and rotary positions."""
        if (cache := self._carry.cache) is not None:
            kw = kw | {CACHE: cache, "position_ids": cache.positions(args[0])}
        return args, kw

    def _enter_attention(self, _module: nn.Module, args: Any, kw: dict[str, Any]) -> Any:
        """Give attention the cache, which stock layers that run again do not pass on."""
        return args, kw | ({} if self._carry.cache is None else {CACHE: self._carry.cache})

    def _enter_layer(self, key: str, _mixer: nn.Module, args: Any, kw: dict[str, Any]) -> Any:
        """Note which layer runs, and keep the cache from it, whose states are carried here."""
        self._carry.enter(key)
        return args, {name: value for name, value in kw.items() if name not in ("cache", "cache_params")}

    def _convolution(
        self, stock: Callable[..., Tensor], x: Tensor, weight: Tensor, *args: Any, **kw: Any
    ) -> Tensor:
        if not self._carry.is_open:
            return stock(x, weight, *args, **kw)
        kept = weight.shape[-1] - 1
        before = self._carry.before
        past = x.new_zeros(*x.shape[:-1], kept) if before is None else before.inputs
        x = torch.cat([past, x], dim=-1)
        self._carry.inputs[self._carry.layer] = x[..., -kept:].detach()
        return stock(x, weight, *args, **kw)[..., kept:]

    def _selective_scan(
        self,
        stock: Callable[..., Any],
        scan: Callable[..., tuple[Tensor, Tensor, Tensor | None]],
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        **kw: Any,
    ) -> Any:
        """The stock function of this name (transformers 5.23, modeling_mamba.py), or ``scan`` from a state."""
        if not (self._on_cpu or self._carry.is_open):
            if self._steps is not None:
                dt = self._selected_steps(dt, delta_bias, delta_softplus).to(u.dtype).contiguous()
                delta_bias, delta_softplus = None, False
            return stock(u, dt, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus, **kw)
        dt = self._selected_steps(dt, delta_bias, delta_softplus)
        A_log = torch.log(-A)
        h, trace = self._carry.start(A_log, (*u.shape[:2], A.shape[1]), u)
        y, state, trace = scan(u, dt, A, B, C, h, trace, D, z)
        self._carry.keep(A_log, state, trace)
        y = y.to(u.dtype)
        return (y, state) if kw.get("return_last_state") else y

    def _selected_steps(self, dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
        """Δ (batch, channels, length) in float32, after :meth:`stepping` where that is open."""
        dt = dt.float() if bias is None else dt.float() + bias[:, None]
        dt = functional.softplus(dt) if softplus else dt
        return dt if self._steps is None else self._steps(self._carry.layer, dt.transpose(1, 2)).transpose(1, 2)

    def _fused_selective_mixer(self, stock: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """The fused kernel of a Mamba-1 mixer; None if it cannot be used: stock code then runs step by step.

        In mamba-ssm 2.3 its backward pass leaves out the norms of Falcon Mamba's B, C and Δ.
        """
        if self._steps is not None or self._carry.is_open or kw.get("b_rms_weight") is not None:
            return None
        return stock(*args, **kw)

    def _fused_mixer(
        self,
        stock: Callable[..., Any],
        convolve: Callable[..., Tensor],
        projected: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        dt_bias: Tensor,
        A: Tensor,
        *,
        headdim: int,
        outproj_weight: Tensor,
        outproj_bias: Tensor | None,
        activation: str,
        **kw: Any,
    ) -> Tensor | None:
        """The fused kernel of a Mamba-2 mixer; None if it cannot be used: stock code then runs step by step.

        The output projection stays outside: the kernel would compute the gradient of its frozen weight.

        Args:
            projected: (batch, length, 2 * d_inner + 2 * groups * states + heads): gate, convolution, time step.
        """
        if self._steps is not None or (self._carry.is_open and kw["dt_limit"][0] > 0):
            return None
        settings = kw | {"headdim": headdim, "activation": activation}
        run = partial(stock, conv1d_weight=conv_weight, conv1d_bias=conv_bias, dt_bias=dt_bias, A=A, **settings)
        # The layer itself, since a quantised one is more than its weight.
        project: Any = self._mixers[self._carry.layer].out_proj
        if not self._carry.is_open:
            out = run(projected)
            return None if out is None else project(out)
        heads, (channels, width) = dt_bias.shape[0], conv_weight.shape
        kept, d_inner = width - 1, heads * headdim
        states = (channels - d_inner) // (2 * kw["ngroups"])
        convolved = slice(d_inner, d_inner + channels)
        # The convolution's last inputs are put before the piece, as tokens that leave the state unchanged.
        past = projected.new_zeros(projected.shape[0], kept, projected.shape[2])
        past[..., -heads:] = NO_STEP
        if before := self._carry.before:
            past[..., convolved] = before.inputs.transpose(1, 2)
        padded = torch.cat([past, projected], dim=1)
        self._carry.inputs[self._carry.layer] = padded[:, -kept:, convolved].transpose(1, 2).detach().clone()
        A_log = torch.log(-A)
        h, trace = self._carry.start(A_log, (projected.shape[0], heads, headdim, states), projected)
        result = run(padded, initial_states=h, return_final_states=True)
        if result is None:
            return None
        out, state = result
        if trace is not None:
            with torch.no_grad():
                inputs = padded[..., convolved].transpose(1, 2)
                xBC = convolve(inputs, conv_weight, conv_bias, activation=activation)[..., kept:].transpose(1, 2)
                x = xBC[..., :d_inner].unflatten(-1, (heads, headdim))
                B = xBC[..., d_inner : (d_inner + channels) // 2].unflatten(-1, (kw["ngroups"], states))
                steps = {"dt_bias": dt_bias, "dt_softplus": True, "dt_limit": kw["dt_limit"]}
                trace = _chunk_trace(x, projected[..., -heads:], steps, A, B, h, trace)
        self._carry.keep(A_log, state, trace)
        projection: Tensor = project(out[:, kept:])
        return projection

    def _chunk_scan(
        self, stock: Callable[..., Any], x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *args: Any, **kw: Any
    ) -> Any:
        if self._steps is not None:
            dt = self._steps(self._carry.layer, _chunk_steps(dt, kw))
            kw = kw | {"dt_bias": None, "dt_softplus": False, "dt_limit": (0.0, float("inf"))}
        if not self._carry.is_open:
            return stock(x, dt, A, B, *args, **kw)
        A_log = torch.log(-A)
        batch, _, heads, head_dim = x.shape
        shape = (batch, heads, head_dim, B.shape[-1])
        h, trace = self._carry.start(A_log, shape, x)
        y, state = stock(x, dt, A, B, *args, **(kw | {"initial_states": h, "return_final_states": True}))
        trace = None if trace is None else _chunk_trace(x, dt, kw, A, B, h, trace)
        self._carry.keep(A_log, state, trace)
        return (y, state) if kw.get("return_final_states") else y

    def _delta_rule(
        self,
        stock: Callable[..., Any],
        plain: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        **kw: Any,
    ) -> Any:
        """The gated delta rule, or Kimi's with a decay for each channel, of g = -exp(A_log) Δ."""
        if not self._carry.is_open:
            return stock(query, key, value, g=g, beta=beta, **kw)
        A_log: Any = self._mixers[self._carry.layer].A_log
        A_log = A_log.float().flatten()
        batch, _, heads, columns = value.shape
        h, trace = self._carry.start(A_log, (batch, heads, key.shape[-1], columns), key)
        carrying = kw | {"initial_state": h, "output_final_state": True}
        y, state = stock(query, key, value, g=g, beta=beta, **carrying)
        trace = None if trace is None else _delta_trace(plain, key, value, g, beta, h, trace, kw)
        self._carry.keep(A_log, state, trace)
        return y, state if kw.get("output_final_state") else None


def _scan_for_cpu() -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """The scan compiled for the CPU. Raises CalibrationError if there is no compiler."""
    what = "Mamba-1 runs on CPU by a scan that numba compiles, and numba cannot be imported"
    with boundary(what, CalibrationError, "Install it: pip install numba"):
        from calibrator.cpu_scan import selective_scan

    def scan(
        u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, trace: Tensor | None, D: Any, z: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        B, C = B.float().transpose(1, 2), C.float().transpose(1, 2)
        y, state, end_trace = selective_scan(u.float(), dt, A, B, C, h, trace)
        y = y if D is None else y + u * D[:, None]
        return y if z is None else y * functional.silu(z), state, None if trace is None else end_trace

    return scan


def _on_its_gpu(kernel: Callable[..., Any], x: Tensor, *args: Any, **kw: Any) -> Any:
    """Call a kernel with its first argument's GPU as the current one.

    The chunk scan of mamba-ssm 2.3 starts on the current GPU, wherever its tensors are.
    """
    with torch.cuda.device_of(x):
        return kernel(x, *args, **kw)


def _chunk_steps(dt: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Δ (batch, length, heads) in float32 under a stock call's dt_bias, dt_softplus and dt_limit."""
    bias = settings.get("dt_bias")
    dt = dt.float() if bias is None else dt.float() + bias.float()
    if settings.get("dt_softplus"):
        dt = functional.softplus(dt)
    return dt.clamp(*settings.get("dt_limit", (0.0, float("inf"))))


@torch.no_grad()
def _chunk_trace(
    x: Tensor, dt: Tensor, settings: Mapping[str, Any], A: Tensor, B: Tensor, h: Tensor, trace: Tensor
) -> Tensor:
    """dh/dA_log at the end of a piece of Mamba-2, where h = Σ_t exp(c_t) Δ_t x_t B_t and c_t = A Σ_{s>t} Δ_s.

    A and so c are linear in exp(A_log), hence dh/dA_log = Σ_t c_t exp(c_t) Δ_t x_t B_t.

    Args:
        x: (batch, length, heads, head_dim). dt: (batch, length, heads). A: (heads,).
        settings: of the stock call, by which ``dt`` becomes Δ.
        B: (batch, length, groups, states). h, trace: (batch, heads, head_dim, states), at the start.
    """
    dt = _chunk_steps(dt, settings)
    log_decay = dt * A.float()
    to_end = log_decay.flip(1).cumsum(1).flip(1)
    c = to_end - log_decay
    weighted = x.float() * (c * c.exp() * dt)[..., None]
    groups = B.shape[2]
    heads = x.shape[2] // groups
    result = torch.einsum("blghp,blgn->bghpn", weighted.unflatten(2, (groups, heads)), B.float()).flatten(1, 2)
    whole = to_end[:, 0, :, None, None]
    return result + whole.exp() * (whole * h + trace)


@torch.no_grad()
def _delta_trace(
    rule: Callable[..., Any],
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    h: Tensor,
    trace: Tensor,
    settings: Mapping[str, Any],
) -> Tensor:
    """dh/dA_log at the end of a piece of a delta rule: dg/dA_log = g, and forward differentiation does the rest.

    Args:
        rule: stock transformers' plain torch function.
        h, trace: (batch, heads, keys, columns), at the start. The others as stock code gives them to the rule.
    """
    parts = (tensor.split(DELTA_TOKENS, dim=1) for tensor in (key, value, g, beta))
    for k, v, decay, b in zip(*parts, strict=True):

        def end(decay: Tensor, h: Tensor, k: Tensor = k, v: Tensor = v, b: Tensor = b) -> Any:
            given = {**settings, "g": decay, "beta": b, "initial_state": h, "output_final_state": True}
            return rule(k, k, v, **given)[1]

        h, trace = torch.func.jvp(end, (decay, h), (decay, trace))[:2]
    return trace


def _with_its_convolution(model: nn.Module, mixer: nn.Module) -> nn.Module:
    """The module that runs a mixer's convolution and scan; Kimi's keeps its A_log in a part of that."""
    own = (module for module in model.modules() if isinstance(getattr(module, "conv1d", None), nn.Conv1d))
    return next((module for module in own if any(part is mixer for part in module.modules())), mixer)
