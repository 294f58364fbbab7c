"""The kernels of stock models: what is said where they are missing, refused, or there but of no use on CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next

from calibrator.kernels import install_lines, missing_kernels, packages_of, refused_shape, require_kernels
from converter.errors import CalibrationError
from tests.kernels_package import write_kernels_package
from tests.stock_models import RememberingReporter, stock_model
from tests.tiny_models import SETTINGS

# Stands in for packages that import everywhere and whose functions only run on a GPU.
CRASHING = """
__version__ = "9.9"
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    def crash(*args, **kwargs):
        raise RuntimeError(f"{name}: Expected x.is_cuda() to be true")
    return crash
"""
RUN_ON_CPU = """
import torch
from tests.stock_models import stock_model
for model_type in ("mamba", "mamba2", "qwen3_next"):
    stock = stock_model(model_type)
    tokens = torch.arange(40)[None]
    try:
        stock.hidden_states(tokens)
    except RuntimeError as error:
        assert "is_cuda" in str(error), error
        print(model_type, "crashes")
    with stock.recurrence:
        assert stock.hidden_states(tokens).isfinite().all()
    print(model_type, "runs")
"""


def package(folder: Path, name: str, content: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(content)


RECURRENCE_WITH_KERNELS_PACKAGE = """
import torch
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from calibrator.kernels import packages_of
from tests.stock_models import stock_model
for module in (modeling_mamba, modeling_mamba2):
    assert isinstance(module.causal_conv1d_fn, torch.nn.Module), "transformers does not use the package"
    assert packages_of(module) == {"mamba_ssm", "causal_conv1d"}, packages_of(module)
for model_type in ("mamba", "mamba2"):
    stock = stock_model(model_type)
    tokens = torch.arange(40)[None]
    with stock.recurrence as recurrence:
        whole = stock.hidden_states(tokens)
        with recurrence.carried(None) as state:
            stock.hidden_states(tokens[:, :20])
        with recurrence.carried(state):
            torch.testing.assert_close(stock.hidden_states(tokens[:, 20:]), whole[:, 20:], atol=1e-4, rtol=1e-4)
print("carried")
"""


def test_states_are_carried_where_the_package_kernels_is_installed(tmp_path: Path) -> None:
    write_kernels_package(tmp_path)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", RECURRENCE_WITH_KERNELS_PACKAGE]
    result = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "carried" in result.stdout, result.stderr


def test_a_run_on_cpu_calls_no_kernel_where_kernels_import(tmp_path: Path) -> None:
    for name in ("mamba_ssm", "causal_conv1d", "fla"):
        package(tmp_path, name, CRASHING)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", RUN_ON_CPU]
    result = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    words = result.stdout.split("\n")
    assert [word for word in words if "runs" in word] == ["mamba runs", "mamba2 runs", "qwen3_next runs"]
    assert [word for word in words if "crashes" in word], "the stand-ins were not called without the recurrence"


def test_packages_are_those_whose_kernels_the_modeling_file_calls() -> None:
    assert packages_of(modeling_mamba) == packages_of(modeling_mamba2) == {"mamba_ssm", "causal_conv1d"}
    assert packages_of(modeling_qwen3_next) == {"fla", "causal_conv1d"}


def test_missing_kernels_are_named_with_the_lines_that_install_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, "mamba_ssm", "import selective_scan_cuda_that_was_not_built")
    package(tmp_path, "causal_conv1d", "")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("mamba_ssm", "causal_conv1d"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    packages = packages_of(modeling_mamba)
    assert list(missing_kernels(packages)) == ["mamba_ssm"]
    with pytest.raises(CalibrationError, match="selective_scan_cuda_that_was_not_built") as caught:
        require_kernels(packages, torch.device("cuda:0"))
    fix = caught.value.fix
    assert f"torch=={torch.__version__.split('+')[0]}" in fix
    assert "MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation mamba-ssm" in fix
    assert "causal-conv1d" not in fix
    assert "--allow-slow" in fix
    assert any("CAUSAL_CONV1D_FORCE_BUILD=TRUE" in line for line in install_lines(["causal_conv1d"]))


def test_kernels_found_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "causal_conv1d", "")
    (tmp_path / "causal_conv1d-9.9.dist-info").mkdir()
    (tmp_path / "causal_conv1d-9.9.dist-info" / "METADATA").write_text("Name: causal-conv1d\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "causal_conv1d", raising=False)
    reporter = RememberingReporter()
    require_kernels(["causal_conv1d"], torch.device("cuda"), reporter)
    assert reporter.lines == ["Kernels: causal-conv1d 9.9."]


@pytest.mark.parametrize(("heads", "refused"), [(4, True), (8, False)])
def test_a_shape_that_the_kernels_refuse_is_named(heads: int, refused: bool) -> None:
    settings = SETTINGS["mamba2"] | {"num_heads": heads, "head_dim": 128 // heads}
    with patch.dict(SETTINGS, {"mamba2": settings}):
        stock = stock_model("mamba2")
    sentence = refused_shape(stock.mixers)
    assert bool(sentence) == refused
    if refused:
        assert "2*128 + 2*1*16 + 4 = 292 is not a multiple of 8" in sentence
    assert refused_shape(stock_model("mamba").mixers) == ""
