"""Which programs serve a converted model, and the exact line that each takes.

Architectures are those of vLLM 0.33, SGLang 0.5.23, llama.cpp as in llama-cpp-python 0.3.36 and mlx-lm 0.32.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from converter.manifest import SourceRecord

_BY_ALL = frozenset(
    ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "kimi_linear", "qwen3_next")
) | {"qwen3_5", "qwen3_5_moe"}


@dataclass(frozen=True)
class Runtime:
    """One program.

    Attributes:
        model_types: the architectures it knows, by transformers' names.
        run: those with which it was run on a converted model here; of the others its source was only read.
        lines: the commands for a model at ``place``, of ``length`` tokens where that is known.
        caches_prefixes: whether it can keep the state behind a prefix for later requests.
    """

    name: str
    model_types: frozenset[str]
    run: frozenset[str]
    lines: Callable[[str, int | None], str]
    caches_prefixes: bool = False


STATE = (
    "The lines of vLLM and SGLang keep the SSM state in float32. Rounded to bfloat16 or float16 after every 256 "
    "tokens, it changed the perplexity of small converted Mamba models by less than 0.1 %; in servers this was not "
    "measured."
)

CACHING = (
    "No line switches on multi-token prediction: together with prefix caching, which a server may have on by "
    "itself, it is reported to corrupt the state of hybrid models."
)

MLX_MAMBA2 = (
    "mlx-lm converts a Mamba-2 only if config.json has `intermediate_size`, `time_step_limit` and "
    "`time_step_rank`, which stock transformers does not write: add those that are missing."
)


def _option(name: str, length: int | None) -> str:
    return f" {name} {length}" if length else ""


def _vllm(place: str, length: int | None) -> str:
    return f"vllm serve {place}{_option('--max-model-len', length)} --mamba-ssm-cache-dtype float32"


def _sglang(place: str, length: int | None) -> str:
    option = _option("--context-length", length)
    return f"python -m sglang.launch_server --model-path {place}{option} --mamba-ssm-dtype float32"


def _llama_cpp(place: str, length: int | None) -> str:
    return f"python convert_hf_to_gguf.py {place} --outfile model.gguf\n{llama_server('model.gguf', length)}"


def _mlx(place: str, length: int | None) -> str:
    return f"mlx_lm.convert --hf-path {place} --mlx-path model-mlx -q\n{mlx_server('model-mlx')}"


def llama_server(file: str, length: int | None) -> str:
    """The line that serves a GGUF file."""
    return f"llama-server -m {file}{_option('-c', length)}"


def mlx_server(place: str) -> str:
    """The line that serves an MLX folder."""
    return f"mlx_lm.server --model {place}"


VLLM = Runtime("vLLM", _BY_ALL | {"jamba", "zamba2", "olmo_hybrid", "qwen4_exp"}, frozenset(), _vllm, True)
SGLANG = Runtime("SGLang", _BY_ALL, frozenset(), _sglang, True)
LLAMA_CPP = Runtime(
    "llama.cpp", _BY_ALL | {"jamba", "bamba", "qwen4_exp"}, frozenset(("mamba", "mamba2")), _llama_cpp
)
MLX_LM = Runtime("mlx-lm", _BY_ALL | {"jamba", "olmo_hybrid"}, frozenset(("mamba2",)), _mlx)


def runtimes_of(source: SourceRecord) -> list[Runtime]:
    """The programs that know an architecture; a quantised checkpoint is only for those that serve it as it is."""
    known = (VLLM, SGLANG) if source.quantisation else (VLLM, SGLANG, LLAMA_CPP, MLX_LM)
    return [runtime for runtime in known if source.model_type.removesuffix("_text") in runtime.model_types]
