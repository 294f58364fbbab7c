"""The scale module: converter.scales' formula as a torch parametrisation of a stock model's A_log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from converter.scales import Form, Granularity, ScaleSet, factor_shape, scaled_A_log


class Scale(nn.Module):
    """Factors of one layer, learnt as their logarithm.

    Args:
        A_log: float32, as the checkpoint's file holds it; any shape.
        granularity, form: see :class:`converter.scales.ScaleSet`.
    """

    def __init__(self, A_log: Tensor, granularity: Granularity, form: Form) -> None:
        super().__init__()
        self.register_buffer("A_log", A_log, persistent=False)
        self.log_s = nn.Parameter(A_log.new_zeros(factor_shape(tuple(A_log.shape), granularity)))
        self.form: Form = form
        self.load_dtype: torch.dtype | None = None
        self.is_off = False

    def forward(self, _stock: Tensor) -> Tensor:
        """A_log as the model runs it: scaled, in float32, rounded only while ``load_dtype`` is set."""
        assert isinstance(self.A_log, Tensor)
        if self.is_off:
            return self.A_log
        scaled = scaled_A_log(self.A_log, self.log_s, self.form, torch.exp)
        return scaled if self.load_dtype is None else scaled.to(self.load_dtype).float()


class Scaling:
    """The factors of every scaled layer, put on a stock model while open.

    Args:
        mixers: name of an A_log tensor in the checkpoint's files to the module that holds it.
        A_log: the same names to the values in the files, float32.
    """

    def __init__(
        self, mixers: Mapping[str, nn.Module], A_log: Mapping[str, Tensor], granularity: Granularity, form: Form
    ) -> None:
        self.granularity: Granularity = granularity
        self.form: Form = form
        self._mixers = mixers
        self._scales = {key: Scale(A_log[key], granularity, form) for key in mixers}

    def __enter__(self) -> Scaling:
        for key, mixer in self._mixers.items():
            scale = self._scales[key].to(next(mixer.parameters()).device)
            parametrize.register_parametrization(mixer, "A_log", scale, unsafe=True)
        return self

    def __exit__(self, *_: object) -> None:
        for mixer in self._mixers.values():
            if parametrize.is_parametrized(mixer, "A_log"):
                parametrize.remove_parametrizations(mixer, "A_log", leave_parametrized=False)

    def parameters(self) -> list[nn.Parameter]:
        """The logarithms of the factors, float32, one tensor a layer."""
        return [scale.log_s for scale in self._scales.values()]

    def scale_set(self) -> ScaleSet:
        """The factors as they are now."""
        log_s = {key: scale.log_s.detach().cpu().numpy().copy() for key, scale in self._scales.items()}
        return ScaleSet(self.form, self.granularity, log_s)

    def load(self, scales: ScaleSet) -> None:
        """Take over factors of the same form and granularity."""
        with torch.no_grad():
            for key, scale in self._scales.items():
                scale.log_s.copy_(torch.from_numpy(np.ascontiguousarray(scales.log_s[key])))

    def rounded(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """While open, scaled tensors are rounded as stock transformers does when it loads them in ``dtype``."""
        return self._each("load_dtype", dtype)

    def off(self) -> AbstractContextManager[None]:
        """While open, the model is the unscaled one."""
        return self._each("is_off", True)

    @contextmanager
    def _each(self, name: str, value: object) -> Iterator[None]:
        """While open, an attribute of every layer's scale has a value."""
        with ExitStack() as stack:
            for scale in self._scales.values():
                stack.enter_context(patch.object(scale, name, value))
            yield
