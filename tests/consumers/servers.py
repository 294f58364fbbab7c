"""The functions by which vLLM and SGLang read a model's config and weights, cut loose from their packages."""

from __future__ import annotations

import ast
import logging
import sys
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoConfig, MambaConfig, PretrainedConfig

from tests.consumers.fetch import FOLDER

VLLM, SGLANG = FOLDER / "vllm/model_arch_config_convertor.py", FOLDER / "sglang/common.py"
SGLANG_MODELS = {"mamba": FOLDER / "sglang/falcon_mamba.py", "mamba2": FOLDER / "sglang/mamba2.py"}


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


def sglang_config(folder: Path) -> Any:
    """The config that SGLang makes of a folder in the state-spaces layout; None where it does not know it."""
    configs = SimpleNamespace(MambaConfig=MambaConfig)
    with patch.dict(sys.modules, {"sglang.srt.configs.mamba": configs}):
        scope = {"PretrainedConfig": PretrainedConfig, "Optional": Optional}
        read = _cut(SGLANG.with_name("config.py"), "_try_load_raw_mamba_config", scope=scope)
        return read["_try_load_raw_mamba_config"](str(folder), None)


def sglang_weights(model_type: str, names: Iterable[str], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What SGLang's loader puts into parameters of these names; one that it skips is not among them."""
    taken: dict[str, Tensor] = {}
    parameters = {
        name: SimpleNamespace(
            weight_loader=lambda parameter, value: taken.update({parameter.name: value}), name=name
        )
        for name in names
    }
    scope = {name: getattr(typing, name) for name in ("Iterable", "Set", "Tuple")}
    scope |= {"torch": torch, "default_weight_loader": None, "logger": logging.getLogger(__name__)}
    load = _cut(SGLANG_MODELS[model_type], "load_weights", scope=scope)["load_weights"]
    load(SimpleNamespace(named_parameters=parameters.items), weights.items())
    return taken


def _cut(path: Path, *names: str, scope: dict[str, Any] | None = None) -> dict[str, Any]:
    """Definitions of a file by their names, the first of each, run without the rest of the file.

    Args:
        scope: what else they use.
    """
    wanted: dict[str, ast.stmt] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            wanted.setdefault(node.name, node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            wanted.setdefault(node.targets[0].id, node)
    scope = scope or {}
    module = ast.Module([wanted[name] for name in names], type_ignores=[])
    exec(compile(module, str(path), "exec"), scope)
    return scope
