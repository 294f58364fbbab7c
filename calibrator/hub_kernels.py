"""Compiled kernels from the Hub, for machines that cannot build them: asked about once, and pinned to a commit."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Iterable
from types import ModuleType

from converter.cache import cache_folder
from converter.disk import write_whole
from converter.errors import CalibrationError, boundary
from converter.hub import hub_errors
from converter.reporting import Reporter

REPOSITORIES = {
    "mamba_ssm": ("kernels-community/mamba-ssm", "v4"),
    "causal_conv1d": ("kernels-community/causal-conv1d", "v1"),
    "fla": ("kernels-community/fla", "v2"),
}
"""Package to the repository that has its functions, and the branch of the version that stock code calls."""
LOADED: dict[str, str] = {}
"""Package to the repository and commit that this process has it from."""


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
    pins: dict[str, str] = json.loads(pins_file.read_bytes()) if pins_file.is_file() else {}
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
    from calibrator.kernels import kernel_functions

    assert module.__spec__ is not None and module.__spec__.loader is not None
    fresh = importlib.util.module_from_spec(module.__spec__)
    module.__spec__.loader.exec_module(fresh)
    functions = kernel_functions(fresh)
    for name in functions:
        setattr(module, name, getattr(fresh, name))
    chosen = {name: inspect.getclosurevars(function).nonlocals for name, function in functions.items()}
    return [name for name, variables in chosen.items() if not variables.get("is_new_implementation", True)]
