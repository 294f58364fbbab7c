"""Memory for activations: how many layers keep all of them, their input only, or their input in host memory.

A layer that keeps its input only runs again in the backward pass. What a length needs is measured on the first
pass over it and not derived from the architecture, so that this serves every stock model alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from calibrator.host_store import HostStore
from calibrator.model import StockModel
from calibrator.quantised import REMEDY
from calibrator.weight_stream import MemoryMode, outermost_layers
from converter.errors import CalibrationError, UsageError, boundary
from converter.reporting import Reporter

# The part of the free memory to count on: the allocator's blocks do not fit together without gaps.
USABLE = 0.92
# Smaller tensors among a layer's inputs (masks, positions) stay on the device.
SMALLEST_STORED = 1 << 20
# A second measurement, under the plan that the first led to, tells what a layer more really takes.
MEASUREMENTS = 2
WARM_UP_TOKENS = 512


@dataclass(frozen=True)
class LayerPlan:
    """What the layers keep from the forward pass for the backward pass.

    Attributes:
        layers: how many there are.
        kept: of the last ones, all activations.
        on_host: of the first ones, the input in host memory. Those between keep their input on the device.
    """

    layers: int
    kept: int
    on_host: int

    def lower(self) -> LayerPlan | None:
        """The next plan that needs less memory on the device, or None if there is none."""
        if self.kept:
            return LayerPlan(self.layers, self.kept // 2, self.on_host)
        if self.on_host < self.layers:
            return LayerPlan(self.layers, 0, min(self.layers, max(2 * self.on_host, self.layers // 2, 1)))
        return None

    def sentence(self) -> str:
        """The plan in words."""
        if self.kept == self.layers:
            return f"all {self.layers} layers keep their activations"
        parts = [f"of {self.layers} layers {self.layers - self.kept} run twice"]
        if self.on_host:
            parts.append(f"{self.on_host} of them with their input in host memory")
        return ", ".join(parts)


@dataclass(frozen=True)
class Need:
    """The device memory that a pass over some number of tokens took.

    Attributes:
        plan: under which it ran.
        peak: most bytes allocated. One layer at least had all its activations then, the one whose gradient ran.
        input_bytes: of one layer.
        kept_bytes: of one layer's activations, its output among them.
    """

    plan: LayerPlan
    peak: int
    input_bytes: int
    kept_bytes: int

    def best_plan(self, budget: float) -> LayerPlan:
        """The plan that runs fewest layers twice within ``budget`` bytes, and then stores fewest on the host."""
        layers = self.plan.layers
        input_bytes, more_bytes = max(1, self.input_bytes), max(1, self.kept_bytes - self.input_bytes)
        # With one layer kept or none the peak is the same.
        one_kept = self.peak + self.plan.on_host * input_bytes - max(0, self.plan.kept - 1) * more_bytes
        room = budget - one_kept
        if room >= 0:
            return LayerPlan(layers, min(layers, 1 + int(room // more_bytes)), 0)
        return LayerPlan(layers, 0, min(layers, math.ceil(-room / input_bytes)))


class Activations:
    """Runs forward and backward passes in the memory there is.

    Args:
        parameters: what gets gradients.
        mode: ``auto`` measures and chooses; the others say what all layers do: keep their activations, keep
            their input, or keep that in host memory. Where the weights come from host memory no layer keeps more
            than its input.
        budget: bytes to stay within on the device; what is free by default.

    Raises:
        UsageError: there is no GPU to offload from.
    """

    def __init__(
        self,
        stock: StockModel,
        parameters: Sequence[nn.Parameter],
        mode: MemoryMode,
        reporter: Reporter,
        budget: int | None = None,
    ) -> None:
        self._stock = stock
        self._parameters = parameters
        self._mode = mode
        self._reporter = reporter
        self._budget = budget
        self._layers = outermost_layers(stock.model)
        self._store = HostStore()
        self._plans: dict[int, LayerPlan] = {}
        self._needs: dict[int, list[Need]] = {}
        self._on_gpu = stock.device.type == "cuda"
        self._is_warm = not self._on_gpu and not stock.is_quantised
        if mode == "offload" and not self._on_gpu:
            raise UsageError("--memory offload moves activations from a GPU, and there is none.", "Use checkpoint.")
        if stock.weights:
            reporter.line(
                f"{stock.weights.nbytes / 1e9:.1f} GB of weights stay in host memory and come to the GPU layer by "
                "layer; every layer runs twice."
            )

    def warm_up(self, with_gradients: bool = True) -> None:
        """Run a short text once on a GPU, so that kernels are compiled and tuned before anything is timed.

        On a CPU as well where the weights are quantised, of which not all kinds have a backward pass.

        Raises:
            CalibrationError: the quantised layers have no backward pass.
        """
        if self._is_warm:
            return
        self._is_warm = True
        tokens = torch.zeros(1, WARM_UP_TOKENS, dtype=torch.int64, device=self._stock.device)
        with self._reporter.task("Compiling and tuning the kernels (once for a shape on a machine)", 2) as task:
            with torch.no_grad():
                self._stock.hidden_states(tokens)
            task.advance()
            what = "These quantised weights give no gradients"
            unable = boundary(what, CalibrationError, REMEDY) if self._stock.is_quantised else nullcontext()
            with unable, checkpointed(self._stock):
                if with_gradients:
                    self._stock.hidden_states(tokens).float().square().mean().backward()
            if self._on_gpu:
                torch.cuda.synchronize()
            task.advance()
        for parameter in self._parameters:
            parameter.grad = None

    def backward(
        self,
        tokens: int,
        loss: Callable[[], Tensor],
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> tuple[Tensor, Any]:
        """Add the gradients of a loss to the parameters.

        Args:
            tokens: how many the loss runs through the model; passes over as many share a plan.
            loss: computes a scalar; it is called again with another plan where memory runs out.
            within: opened around each such call and its backward pass.

        Returns:
            The loss, detached, on the device: nothing waits for it. And what ``within`` gave.

        Raises:
            CalibrationError: the memory does not suffice under any plan.
        """
        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in self._parameters]
        while True:
            plan = self._plans.setdefault(tokens, self._first_plan(tokens))
            try:
                with (
                    _keeping(self._stock, self._layers, plan, self._store),
                    self._measured(tokens),
                    within() as opened,
                ):
                    value = loss()
                    value.backward()
                return value.detach(), opened
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
            # Only now, with the exception, are the failed pass's tensors gone.
            for parameter, gradient in zip(self._parameters, before, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            self._plans[tokens] = self._lower(plan, tokens, reason)

    def _first_plan(self, tokens: int) -> LayerPlan:
        layers = len(self._layers)
        if self._mode == "keep" or (self._mode == "auto" and not self._on_gpu):
            return LayerPlan(layers, layers, 0)
        if self._mode == "offload":
            return LayerPlan(layers, 0, layers)
        if not (self._is_measuring or self._stock.weights):
            return LayerPlan(layers, 0, 0)
        # One layer keeps its activations for the sake of the measurement.
        inputs = layers * tokens * self._stock.model.config.get_text_config().hidden_size * 4
        return LayerPlan(
            layers, 0 if self._stock.weights else min(1, layers), layers if inputs > self._usable() / 2 else 0
        )

    @property
    def _is_measuring(self) -> bool:
        return self._mode == "auto" and self._on_gpu and not self._stock.weights

    def _usable(self) -> float:
        """Bytes on the device that allocations may reach."""
        if self._budget is not None:
            return self._budget
        device = self._stock.device
        return USABLE * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))

    def _lower(self, plan: LayerPlan, tokens: int, reason: str) -> LayerPlan:
        lower = plan.lower()
        if lower is None:
            raise CalibrationError(
                f"The GPU's memory does not suffice for {tokens} tokens a pass: {reason}",
                "Use a shorter --target-len, or --memory stream.",
            )
        self._reporter.warn(f"Out of memory with {tokens} tokens a pass; going on so: {lower.sentence()}.")
        if self._on_gpu:
            torch.cuda.empty_cache()
        return lower

    @contextmanager
    def _measured(self, tokens: int) -> Iterator[None]:
        """Measure the first passes over so many tokens, and choose the plan of those after them."""
        needs = self._needs.setdefault(tokens, [])
        if not self._is_measuring or not self._layers or len(needs) == MEASUREMENTS:
            yield
            return
        device, sizes = self._stock.device, []

        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sizes.extend([inputs[0].nbytes, torch.cuda.memory_allocated(device)])

        def after(*_: Any) -> None:
            sizes.append(torch.cuda.memory_allocated(device))

        handles = [
            self._layers[-1].register_forward_pre_hook(before),
            self._layers[-1].register_forward_hook(after),
        ]
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        plan, (input_bytes, start, end) = self._plans[tokens], sizes[:3]
        # Only a layer that keeps its activations shows what they take.
        kept_bytes = end - start if plan.kept else needs[-1].kept_bytes if needs else input_bytes
        needs.append(Need(plan, torch.cuda.max_memory_allocated(device), input_bytes, kept_bytes))
        self._plans[tokens] = needs[-1].best_plan(self._usable())
        if len(needs) == MEASUREMENTS:
            self._reporter.line(f"Memory for {tokens} tokens a pass: {self._plans[tokens].sentence()}.")


def _run_twice(store: HostStore | None, enter: Callable[[], None], layer: Callable[..., Any], *inputs: Any) -> Any:
    """Run a layer that keeps its inputs only, in ``store`` where there is one, until the backward pass.

    Args:
        enter: called before either run; a hook of the layer is not called before the second in transformers 5.23.
    """

    def run(*inputs: Any) -> Any:
        enter()
        return layer(*inputs)

    def pack(tensor: Tensor) -> Any:
        return store.put(tensor) if store and tensor.is_cuda and tensor.nbytes >= SMALLEST_STORED else tensor

    def unpack(packed: Any) -> Tensor:
        return store.take(packed) if store and not isinstance(packed, Tensor) else packed

    with saved_tensors_hooks(pack, unpack) if store else nullcontext():
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def _keeping(stock: StockModel, layers: Sequence[Any], plan: LayerPlan, store: HostStore | None) -> Iterator[None]:
    """While open, the layers keep activations as planned, host copies in ``store``.

    Stock layers run again in the backward pass when they are in training mode. Only the layers' own flag is set:
    nothing below them changes its behaviour, so that there is no dropout.
    """
    rerun = layers[: plan.layers - plan.kept]
    for index, layer in enumerate(rerun):
        layer.gradient_checkpointing = True
        enter = partial(stock.weights.enter, index) if stock.weights else lambda: None
        layer._gradient_checkpointing_func = partial(_run_twice, store if index < plan.on_host else None, enter)
        layer.training = True
    try:
        yield
    finally:
        for layer in rerun:
            layer.gradient_checkpointing = False
            layer.training = False
        if store is not None:
            store.clear()


def checkpointed(stock: StockModel) -> AbstractContextManager[None]:
    """While open, each layer keeps its input only and runs again in the backward pass."""
    layers = outermost_layers(stock.model)
    return _keeping(stock, layers, LayerPlan(len(layers), 0, 0), None)
