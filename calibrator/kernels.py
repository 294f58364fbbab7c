"""The compiled kernels that stock modeling files call on a GPU: which there are, and which shapes they refuse."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from calibrator.hub_kernels import LOADED
from converter.errors import CalibrationError, redacted_message
from converter.reporting import SILENT, Reporter

DISTRIBUTIONS = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d", "fla": "flash-linear-attention"}
HUB_LINE = "  pip install kernels einops   # then the same command with --hub-kernels"
# causal-conv1d 1.7.0 reads eight channels at a time where a token's channels lie side by side.
ALIGNMENT = 8


def kernel_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """The functions of a stock modeling file for which stock code chose between a kernel and plain torch.

    Such a function carries the plain torch version, defined in the same file, as ``__wrapped__``
    (transformers 5.18 to 5.23, ``use_kernel_func_from_hub_with_fallback``).
    """
    values = {name: _unpacked(value) for name, value in vars(module).items() if not isinstance(value, type)}
    return {
        name: value
        for name, value in values.items()
        if callable(value) and getattr(getattr(value, "__wrapped__", None), "__module__", None) == module.__name__
    }


def _unpacked(value: Any) -> Any:
    """The function in the torch module that the package ``kernels`` (0.17) makes of each where it is installed."""
    if not isinstance(value, nn.Module):
        return value
    return inspect.getclosurevars(type(value).forward).nonlocals.get("func", value)


def packages_of(module: ModuleType) -> set[str]:
    """The packages whose kernels a stock modeling file calls where they can be imported."""
    return {_package(name) for name in kernel_functions(module)}


def _package(function: str) -> str:
    if function.startswith("causal_conv1d"):
        return "causal_conv1d"
    return "mamba_ssm" if function.startswith("mamba") else "fla"


def missing_kernels(packages: Iterable[str]) -> dict[str, str]:
    """The packages that cannot be imported, with the reason.

    Importing is the only test that counts: a package built without its CUDA part is installed all the same.
    """
    missing = {}
    for package in sorted(packages):
        try:
            importlib.import_module(package)
        except Exception as error:
            missing[package] = redacted_message(error)
    return missing


def require_kernels(packages: Iterable[str], device: torch.device, reporter: Reporter = SILENT) -> None:
    """Say which kernels a run on a GPU has.

    Raises:
        CalibrationError: some are missing; the message has the lines that install them on this machine.
    """
    packages = set(packages)
    missing = missing_kernels(packages)
    if missing:
        reasons = "; ".join(f"{DISTRIBUTIONS[package]} ({reason})" for package, reason in missing.items())
        raise CalibrationError(
            f"These kernels are missing, without which a run on {device} takes many hours: {reasons}.",
            f"Take them from the Hub, without a compiler:\n{HUB_LINE}\nor build them with\n"
            + "\n".join(install_lines(missing))
            + "\nor run without them: --allow-slow.",
        )
    if packages:
        found = ", ".join(f"{DISTRIBUTIONS[package]} {_version(package)}" for package in sorted(packages))
        reporter.line(f"Kernels: {found}.")


def _version(package: str) -> str:
    if package in LOADED:
        return f"({LOADED[package]})"
    try:
        return importlib.metadata.version(DISTRIBUTIONS[package])
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"


def install_lines(missing: Iterable[str]) -> list[str]:
    """The commands that build missing kernels against the torch that runs here.

    ``--no-build-isolation`` makes pip build against it; the two switches build the CUDA parts (for Mamba-1 the
    selective scan) rather than look for a wheel made for another version.
    """
    version = torch.__version__.partition("+")[0]
    toolkit = f" (needs nvcc of CUDA {torch.version.cuda})" if torch.version.cuda else ""
    commands = {
        "causal_conv1d": "CAUSAL_CONV1D_FORCE_BUILD=TRUE pip install --no-build-isolation causal-conv1d",
        "mamba_ssm": "MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation mamba-ssm",
        "fla": "pip install --no-build-isolation flash-linear-attention",
    }
    return [
        f"  pip install torch=={version} ninja packaging setuptools wheel{toolkit}",
        *(f"  {command}" for package, command in commands.items() if package in set(missing)),
    ]


def refused_shape(mixers: Mapping[str, nn.Module]) -> str:
    """The reason if the convolution kernel refuses a Mamba-2 mixer's shape, else "".

    The kernel reads the convolution's channels out of one row of the input projection, of 2·d_inner +
    2·n_groups·d_state + n_heads numbers, which must be a multiple of eight.
    """
    for name, mixer in mixers.items():
        if not hasattr(mixer, "n_groups"):
            continue
        d_inner, n_groups, d_state, heads = (
            int(getattr(mixer, size)) for size in ("intermediate_size", "n_groups", "ssm_state_size", "num_heads")
        )
        row = 2 * d_inner + 2 * n_groups * d_state + heads
        if row % ALIGNMENT:
            return (
                f"The kernels refuse the shape of {name.removesuffix('.A_log')}: 2*d_inner + 2*n_groups*d_state + "
                f"n_heads = 2*{d_inner} + 2*{n_groups}*{d_state} + {heads} = {row} is not a multiple of {ALIGNMENT}"
            )
    return ""
