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
