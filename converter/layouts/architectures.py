"""Which architectures have an A_log, where their files keep it, and which of their layers promise one.

Read from the configuration classes of transformers 5.23; older spellings of published config.json files included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from converter.errors import LayoutError
from converter.layouts.config_values import Config, flag, listed, section, whole_number, wrong

LINEAR, FULL, HYBRID, OTHER = "linear_attention", "full_attention", "hybrid", "other"
# Spellings that transformers used before 5.0.
_LEGACY_KINDS = {"mamba": LINEAR, "mamba2": LINEAR, "attention": FULL}


def _alike(kind: str) -> Callable[[Config], list[str]]:
    return lambda config: [kind] * whole_number(config, "num_hidden_layers")


def _jamba(config: Config) -> list[str]:
    period = whole_number(config, "attn_layer_period", 8)
    offset = config.get("attn_layer_offset", 4)
    return [FULL if i % period == offset else LINEAR for i in range(whole_number(config, "num_hidden_layers"))]


def _bamba(config: Config) -> list[str]:
    attention = set(listed(config, "attn_layer_indices", int))
    return [FULL if i in attention else LINEAR for i in range(whole_number(config, "num_hidden_layers"))]


def _zamba(config: Config) -> list[str]:
    period, offset = whole_number(config, "attn_layer_period", 6), config.get("attn_layer_offset", 4)
    rest = range(whole_number(config, "num_hidden_layers") - 3)
    return [LINEAR, LINEAR, HYBRID, *(HYBRID if i % period == offset else LINEAR for i in rest)]


def _zamba2(config: Config) -> list[str]:
    hybrid = set(listed(config, "hybrid_layer_ids", int)) or {6, 12, 18, 24, 30, 36, 42, 47, 51}
    return [HYBRID if i in hybrid else LINEAR for i in range(whole_number(config, "num_hidden_layers", 54))]


def _nemotron_h(config: Config) -> list[str]:
    pattern = config.get("hybrid_override_pattern")
    if pattern is None:
        return [LINEAR, OTHER, FULL, OTHER]
    if not isinstance(pattern, str) or set(pattern) - set("ME*-"):
        raise wrong("hybrid_override_pattern", pattern, "a word of the letters M, E, * and -")
    return [{"M": LINEAR, "*": FULL}.get(letter, OTHER) for letter in pattern]


def _every_nth_full(key: str, default: int) -> Callable[[Config], list[str]]:
    def kinds(config: Config) -> list[str]:
        interval = whole_number(config, key, default)
        layers = range(1, whole_number(config, "num_hidden_layers") + 1)
        return [LINEAR if layer % interval else FULL for layer in layers]

    return kinds


def _olmo_hybrid(config: Config) -> list[str]:
    kinds = _every_nth_full("", 4)(config)
    return kinds if FULL in kinds else [*kinds[:-1], FULL]


def _kimi_linear(config: Config) -> list[str]:
    layers = range(whole_number(config, "num_hidden_layers"))
    nested = section(config, "linear_attn_config")
    if "kda_layers" not in nested:
        return [FULL if i and i % 4 == 0 else LINEAR for i in layers]
    linear = set(listed(nested, "kda_layers", int))
    return [LINEAR if i + 1 in linear else FULL for i in layers]


def named_safe_gate(config: Config) -> bool:
    """Whether a config says that Kimi's delta attention bounds its decay, in the words of fla and of servers."""
    parts = (config, section(config, "linear_attn_config"))
    switches, bounds = ("safe_gate", "use_safe_gate", "kda_safe_gate"), ("gate_lower_bound", "kda_lower_bound")
    return any(
        any(part.get(key) is True for key in switches) or any(part.get(key) is not None for key in bounds)
        for part in parts
    )


def _never(config: Config) -> bool:
    return False


def _named_rope(config: Config) -> bool:
    return config.get("position_embedding_type") == "rope"


def _glm5_safe_gate(config: Config) -> bool:
    nested = section(config, "linear_attn_config")
    bound = nested.get("gate_lower_bound", config.get("linear_lower_bound", -5.0))
    return bound is not None or (bool(nested) and flag(nested, "safe_gate", True))


@dataclass(frozen=True)
class Architecture:
    """Where one architecture keeps its A_log.

    Attributes:
        module: the part of a layer that holds ``A_log``, as the files spell it.
        rank: number of axes of an A_log.
        layer_kinds: the kind of each layer where config.json does not list them itself.
        safe_gate: whether this config replaces the scaled decay by a bounded one, which no scale of A reproduces.
        has_positions: whether its attention has position embeddings.
    """

    module: str
    rank: int
    layer_kinds: Callable[[Config], list[str]]
    safe_gate: Callable[[Config], bool] = named_safe_gate
    has_positions: Callable[[Config], bool] = lambda config: True

    def A_log_key(self) -> re.Pattern[str]:
        """Matches the name of an A_log; group ``layer`` is the layer's number."""
        return re.compile(rf"(?:.+\.)?layers\.(?P<layer>\d{{1,6}})\.(?:mamba_decoder\.)?{self.module}\.A_log")

    def kinds(self, config: Config) -> Sequence[str]:
        """The kind of each layer: ``linear_attention`` and ``hybrid`` have an A_log."""
        kinds = listed(config, "layer_types", str) or listed(config, "layers_block_type", str)
        return [_LEGACY_KINDS.get(kind, kind) for kind in kinds] or self.layer_kinds(config)


_KDA_GATE = partial(flag, key="kda_safe_gate", default=True)
_QWEN = Architecture("linear_attn", 1, _every_nth_full("full_attention_interval", 4))

ARCHITECTURES: Mapping[str, Architecture] = {
    "mamba": Architecture("mixer", 2, _alike(LINEAR), has_positions=_never),
    "falcon_mamba": Architecture("mixer", 2, _alike(LINEAR), has_positions=_never),
    "mamba2": Architecture("mixer", 1, _alike(LINEAR), has_positions=_never),
    "jamba": Architecture("mamba", 2, _jamba, has_positions=_never),
    "zamba": Architecture("mamba", 3, _zamba, has_positions=_never),
    "zamba2": Architecture("mamba", 1, _zamba2, has_positions=partial(flag, key="use_mem_rope", default=False)),
    "bamba": Architecture("mamba", 1, _bamba),
    "falcon_h1": Architecture("mamba", 1, _alike(HYBRID)),
    "granitemoehybrid": Architecture("mamba", 1, _alike(LINEAR), has_positions=_named_rope),
    "nemotron_h": Architecture("mixer", 1, _nemotron_h, has_positions=_never),
    "qwen3_next": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "qwen4_exp": _QWEN,
    "olmo_hybrid": Architecture("linear_attn", 1, _olmo_hybrid),
    "kimi_linear": Architecture("self_attn", 4, _kimi_linear, has_positions=_never),
    "glm5_next": Architecture("self_attn", 1, _every_nth_full("", 4), _glm5_safe_gate),
    "bailing_hybrid": Architecture("attention", 1, _every_nth_full("layer_group_size", 6), _KDA_GATE),
}


MAMBA_3 = "Mamba-3 computes A from its input, so there is no A_log to write a factor into"
# Part of a model_type or of a class's name, without its underlines, to the reason. The first that fits counts.
WITHOUT_A_LOG: Mapping[str, str] = {
    "mamba3": MAMBA_3,
    "rwkv": "RWKV computes its decay from its input by low-rank matrices",
    "minimax": "MiniMax decays by fixed slopes, one a head, which are in no tensor",
    "bailingmoe": "Ling and Ring decay by fixed slopes, one a head, which are in no tensor",
    "lingmoe": "Ling and Ring decay by fixed slopes, one a head, which are in no tensor",
    "ringmoe": "Ling and Ring decay by fixed slopes, one a head, which are in no tensor",
    "granite": "Granite 4.1, like Granite 3, is attention throughout; Granite 4.0 H has layers with an A_log",
}


# With an A_log, in layers that stock transformers does not have.
WITH_CODE_OF_THEIR_OWN: Mapping[str, str] = {"plamo2": "PLaMo-2", "phi4flash": "Phi-4-mini-flash", "gdn2": "GDN-2"}


def refuse_without_A_log(model_type: str, config: Config) -> None:
    """Raise LayoutError for a family that is known to have no A_log."""
    if find_architecture(model_type) is not None:
        return
    classes = listed(config, "architectures", str)
    names = [re.sub("[^a-z0-9]", "", name.lower()) for name in (model_type, *classes)]
    for part, reason in WITHOUT_A_LOG.items():
        if any(part in name for name in names):
            raise LayoutError(f"{model_type} cannot be scaled: {reason}.", "There is no way to convert it.")


def find_architecture(model_type: str) -> Architecture | None:
    """The entry of ``model_type``; the text part of a vision model (``…_text``) counts as the model itself."""
    return ARCHITECTURES.get(model_type.removesuffix("_text"))
