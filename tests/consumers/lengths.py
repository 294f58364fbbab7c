"""The functions by which vLLM and SGLang learn how long a text a model takes, cut loose from their packages."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig

from tests.consumers.fetch import FOLDER

VLLM, SGLANG = FOLDER / "vllm/model_arch_config_convertor.py", FOLDER / "sglang/common.py"


def vllm_length(folder: Path) -> float:
    """What vLLM derives from the config of a folder."""
    derive = _cut(VLLM, "derive_max_model_len_and_key")["derive_max_model_len_and_key"]
    config = AutoConfig.from_pretrained(folder).get_text_config()
    length, _ = derive(SimpleNamespace(hf_text_config=config))
    return float(length)


def sglang_length(folder: Path) -> int:
    """What SGLang takes for the context length of a folder."""
    get = _cut(SGLANG, "CONTEXT_LENGTH_KEYS", "get_context_length")["get_context_length"]
    length: int = get(AutoConfig.from_pretrained(folder).get_text_config())
    return length


def _cut(path: Path, *names: str) -> dict[str, Any]:
    """Definitions of a file by their names, the first of each, run without the rest of the file."""
    wanted: dict[str, ast.stmt] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            wanted.setdefault(node.name, node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            wanted.setdefault(node.targets[0].id, node)
    scope: dict[str, Any] = {}
    module = ast.Module([wanted[name] for name in names], type_ignores=[])
    exec(compile(module, str(path), "exec"), scope)
    return scope
