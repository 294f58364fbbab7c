"""Time and memory that a calibration will take, from a short trial on this machine."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from calibrator.calibration import Problem
from calibrator.loss import SLICE_SCORES, window_losses
from calibrator.methods import METHODS
from calibrator.work import Work

TRIAL_TOKENS, WARM_UP_TOKENS = 512, 16
# Scores, their softmax and its gradient stand side by side.
COPIES_OF_SCORES = 3


@dataclass(frozen=True)
class Estimate:
    """What a conversion will take.

    Attributes:
        calibration_seconds, table_seconds: of finding the scales, and of the before/after table.
        bytes: memory at the peak, of the process on CPU and of the GPU elsewhere.
    """

    calibration_seconds: float
    table_seconds: float
    bytes: int

    def sentence(self, device: str) -> str:
        """The estimate in words."""
        return (
            f"Calibration will take about {_duration(self.calibration_seconds)} on {device}, the table "
            f"{_duration(self.table_seconds)}, memory {self.bytes / 1e9:.1f} GB."
        )


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def estimate(problem: Problem, table_tokens: int) -> Estimate:
    """Time a short run, and count what their backward pass keeps.

    Args:
        table_tokens: tokens that the before/after table runs.
    """
    work: Work = import_module(METHODS[problem.settings.method].module).work(problem)
    with problem.scaling, problem.stock.recurrence:
        problem.activations.warm_up()
        on_cpu = problem.stock.device.type == "cpu"
        # A GPU shows its speed only on as many tokens as run at once.
        forward = _seconds(problem, TRIAL_TOKENS if on_cpu else problem.stock.tokens_at_once, backward=False)
        backward = 0.0
        if work.backward:
            backward = _seconds(problem, TRIAL_TOKENS if on_cpu else work.together, backward=True)
        kept = _bytes_kept(problem, _windows(problem, TRIAL_TOKENS))
    judged = (work.judgements + 1) * problem.validation.tokens
    return Estimate(
        forward * (work.forward + judged) + backward * work.backward / problem.ranks.size,
        forward * table_tokens,
        _bytes_now(problem.stock.device) + _bytes_more(problem, work, kept),
    )


def _windows(problem: Problem, tokens: int) -> Tensor:
    return problem.sampler.peek(tokens).to(problem.stock.device)


def _seconds(problem: Problem, tokens: int, backward: bool) -> float:
    """Seconds a token, in a run after one to warm up; on a GPU of as many tokens, for which kernels are tuned."""
    warm_up = WARM_UP_TOKENS if problem.stock.device.type == "cpu" else tokens
    for windows in (_windows(problem, warm_up), _windows(problem, tokens)):
        started = time.monotonic()
        loss = partial(_mean_loss, problem, windows)
        if backward:
            problem.activations.backward(windows.numel(), loss)[0].item()
        else:
            with torch.no_grad():
                loss().item()
    for parameter in problem.scaling.parameters():
        parameter.grad = None
    return (time.monotonic() - started) / windows.numel()


def _mean_loss(problem: Problem, windows: Tensor) -> Tensor:
    return window_losses(problem.stock, windows).mean()


def _bytes_kept(problem: Problem, windows: Tensor) -> float:
    """Bytes a token that a backward pass through the layers needs, each storage once."""
    storages: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in problem.stock.model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _hidden = problem.stock.hidden_states(windows)
        return sum(storages.values()) / windows.numel()


def _bytes_now(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _bytes_more(problem: Problem, work: Work, kept: float) -> int:
    """What comes on top: activations of a backward pass, or of one layer in a forward pass, and scores."""
    layers = sum(isinstance(module, GradientCheckpointingLayer) for module in problem.stock.model.modules())
    target_len, at_once = problem.settings.target_len, problem.stock.tokens_at_once
    forward = kept / max(1, layers) * (min(at_once, target_len) if problem.stock.can_carry else target_len)
    hidden = problem.stock.model.get_input_embeddings().weight.shape[1] * 4
    each = kept / max(1, layers) + layers * hidden if work.checkpointed else kept
    scores = min(SLICE_SCORES, problem.stock.vocab_size * max(work.together, at_once)) * 4
    return int(max(forward, each * work.together) + COPIES_OF_SCORES * scores)
