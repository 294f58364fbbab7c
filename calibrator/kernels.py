"""The compiled kernels that stock modeling files call on a GPU: which there are, from where, and what they refuse.

Those of the Hub are for machines that cannot build them: asked about once, and pinned to a commit. No torch here
before it is needed, since manifests name them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any

from converter.disk import write_whole
from converter.errors import CalibrationError, boundary, redacted_message
from converter.hub import hub_errors
from converter.reporting import SILENT, Reporter
from converter.temporary import cache_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

DISTRIBUTIONS = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d", "fla": "flash-linear-attention"}
HUB_LINE = "  pip install kernels einops   # then the same command with --hub-kernels"
# causal-conv1d 1.7.0 reads eight channels at a time where a token's channels lie side by side.
ALIGNMENT = 8
REPOSITORIES = {
    "mamba_ssm": ("kernels-community/mamba-ssm", "v4"),
    "causal_conv1d": ("kernels-community/causal-conv1d", "v1"),
    "fla": ("kernels-community/fla", "v2"),
}
"""Package to the repository that has its functions, and the branch of the version that stock code calls."""
LOADED: dict[str, str] = {}
"""Package to the repository and commit that this process has it from."""


def kernel_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """The functions of a stock modeling file for which stock code chose between a kernel and plain torch.

    Such a function carries the plain torch version, defined in the same file, as ``__wrapped__``
    (transformers 5.23 or 5.24, ``use_kernel_func_from_hub_with_fallback``).
    """
    values = {name: _unpacked(value) for name, value in vars(module).items() if not isinstance(value, type)}
    return {
        name: value
        for name, value in values.items()
        if callable(value) and getattr(getattr(value, "__wrapped__", None), "__module__", None) == module.__name__
    }


def _unpacked(value: Any) -> Any:
    """The function in the torch module that the package ``kernels`` (0.17) makes of each where it is installed."""
    forward = getattr(type(value), "forward", None)
    return inspect.getclosurevars(forward).nonlocals.get("func", value) if forward else value


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
    import torch

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


def add_hub_kernels(module: ModuleType, missing: Iterable[str], agreed: bool, reporter: Reporter) -> None:
    """Have a stock modeling file call kernels of the Hub in place of missing packages, if the user agrees.

    They are imported under the packages' names, so that stock code finds them as if they were installed.

    Args:
        agreed: the user has said so on the command line.

    Raises:
        CalibrationError: the Hub cannot be asked, or has no build for this machine.
    """
    if importlib.util.find_spec("kernels") is None:
        return
    from kernels import get_kernel

    pins_file = cache_folder() / "kernels.json"
    pins: dict[str, str] = {}
    # What cannot be read is asked anew.
    with suppress(OSError, ValueError):
        pins = json.loads(pins_file.read_bytes())
    wanted = {package: REPOSITORIES[package] for package in missing}
    new = {repo: branch for repo, branch in wanted.values() if repo not in pins}
    question = f"Run compiled code from the Hub, {' and '.join(new)}? Later runs take the same without asking"
    if new and not (agreed or reporter.agrees(question)):
        return
    pins |= {repo: _commit(repo, branch) for repo, branch in new.items()}
    for package, (repo, _) in wanted.items():
        with boundary(f"{repo} cannot be used", CalibrationError, "Build the package, or add --allow-slow."):
            sys.modules[package] = get_kernel(repo, revision=pins[repo])
        LOADED[package] = f"{repo}@{pins[repo]}"
    pins_file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(pins_file, json.dumps(pins, indent=2).encode())
    if plain := _choose_again(module):
        reporter.warn(f"The kernels of the Hub lack {', '.join(plain)}; plain torch stands in.")


def _commit(repo: str, branch: str) -> str:
    """The commit that a branch of a kernel's repository is at."""
    from huggingface_hub import HfApi

    with hub_errors(repo, CalibrationError, "Or build the package, or add --allow-slow."):
        branches = HfApi().list_repo_refs(repo, repo_type="kernel").branches
    commits = {ref.name: ref.target_commit for ref in branches}
    if branch not in commits:
        raise CalibrationError(f"{repo} has no {branch}.", "Build the package, or add --allow-slow.")
    return commits[branch]


def _choose_again(module: ModuleType) -> list[str]:
    """Have a modeling file choose between kernels and plain torch anew; the functions that are plain still.

    Its classes stay the same objects, and look the functions up by name.
    """
    assert module.__spec__ is not None and module.__spec__.loader is not None
    fresh = importlib.util.module_from_spec(module.__spec__)
    module.__spec__.loader.exec_module(fresh)
    functions = kernel_functions(fresh)
    for name in functions:
        setattr(module, name, getattr(fresh, name))
    chosen = {name: inspect.getclosurevars(function).nonlocals for name, function in functions.items()}
    return [name for name, variables in chosen.items() if not variables.get("is_new_implementation", True)]


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
