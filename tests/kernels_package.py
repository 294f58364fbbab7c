"""A stand-in for the package ``kernels``: what transformers imports of it, and kernels out of a local folder.

It wraps functions as kernels 0.17.2 does. What it cannot show: builds for a GPU, their choice and their signatures.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = '''
import importlib.util, inspect, os, sys
from pathlib import Path

def _anything(*args, **kwargs):
    return _anything

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _anything

def use_kernel_forward_from_hub(name):
    from torch import nn

    def decorator(func):
        if inspect.isclass(func):
            return func

        class Func(nn.Module):
            kernel_layer_name = name

            def forward(self, *args, **kwargs):
                return func(*args, **kwargs)

        return Func()

    return decorator

def use_kernelized_func(*functions):
    assert all(hasattr(function, "kernel_layer_name") for function in functions)
    return lambda cls: cls

def get_kernel(repo_id, revision=None, version=None):
    """A folder in place of the Hub: OWNER/NAME/REVISION holds the kernel's package."""
    file = Path(os.environ["STAND_IN_KERNELS"], repo_id, revision, "__init__.py")
    if not file.is_file():
        raise FileNotFoundError(f"Cannot find a build variant for this system in {repo_id} (revision: {revision})")
    spec = importlib.util.spec_from_file_location("_kernel_" + file.parent.parent.name.replace("-", "_"), file)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
'''


def write_kernels_package(folder: Path, version: str = "0.18.2") -> None:
    """Write the package, for a program whose search path has ``folder``."""
    for path, content in {
        "kernels/__init__.py": PACKAGE,
        f"kernels-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n",
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)


PLAIN = """
import functools, inspect
CALLED = []

def plain(name):
    from calibrator.kernels import kernel_functions
    from transformers.models.mamba2 import modeling_mamba2

    function = inspect.unwrap(kernel_functions(modeling_mamba2)[name])

    @functools.wraps(function)
    def kernel(*args, **kwargs):
        CALLED.append(name)
        return function(*args, **kwargs)

    del kernel.__wrapped__
    kernel.__signature__ = inspect.signature(function)
    return kernel
"""


def write_kernels(folder: Path, commit: str) -> None:
    """Write the two repositories of a commit, with kernels that compute in plain torch and note their calls."""
    mamba, convolution = (folder / "kernels-community" / name / commit for name in ("mamba-ssm", "causal-conv1d"))
    for path, content in {
        mamba / "__init__.py": "from . import ops",
        mamba / "ops/__init__.py": "from . import triton",
        mamba / "ops/triton/__init__.py": "from . import ssd_combined, selective_state_update",
        mamba / "ops/triton/plain.py": PLAIN,
        mamba / "ops/triton/ssd_combined.py": (
            "from .plain import plain\nmamba_chunk_scan_combined = plain('mamba2_chunk_scan')"
        ),
        mamba / "ops/triton/selective_state_update.py": (
            "from .plain import plain\nselective_state_update = plain('mamba2_selective_state_update')"
        ),
        convolution / "plain.py": PLAIN,
        convolution / "__init__.py": (
            "from .plain import CALLED, plain\n"
            "causal_conv1d_fn, causal_conv1d_update = plain('causal_conv1d_fn'), plain('causal_conv1d_update')"
        ),
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
