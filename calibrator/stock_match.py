"""Which tensors stock transformers misses or does not know in a checkpoint, found without reading the weights.

As a program, ``python -m calibrator.stock_match FOLDER`` reads names and shapes as JSON on stdin and writes what it
finds as JSON, so that a process which stays small can ask.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from converter.checkpoint_files import in_short
from converter.errors import CalibrationError, LayoutError, MmodError, boundary
from converter.safetensors_file import parse_json_object

# What an unexpected tensor's name tells of where it comes from, and what helps. The first that is found counts.
_CAUSES = (
    (
        ("lora_", "base_layer.", "modules_to_save."),
        "These are the names of an adapter beside its base.",
        "Merge it first: peft's merge_and_unload(), then save_pretrained().",
    ),
    (
        ("v_head.", "value_head.", "score."),
        "The model was saved with a value or reward head.",
        "Save it without: model.pretrained_model.save_pretrained().",
    ),
    (
        ("mtp.", "nextn", "mtp_"),
        "Layers that predict several tokens at once have an A of their own, which stock transformers does not run.",
        "Take them out of the checkpoint.",
    ),
    (
        ("qweight", "qzeros", "weight_scale", "absmax"),
        "The weights are quantised, and not as config.json says or as stock transformers knows.",
        "Use the checkpoint before it was quantised.",
    ),
)


@dataclass(frozen=True)
class Match:
    """How a checkpoint's tensors and a stock model's fit.

    Attributes:
        missing: what stock code would fill with noise.
        unexpected: what it would leave out.
        mismatched: names whose shape is another.
        unknown: why the two could not be compared, else empty.
    """

    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    mismatched: Sequence[str] = ()
    unknown: str = ""

    def check(self) -> None:
        """Raise LayoutError unless everything matches, with the cause if the names show it."""
        if not (self.missing or self.unexpected or self.mismatched):
            return
        kinds = (
            ("misses", self.missing),
            ("does not know", self.unexpected),
            ("has other shapes for", self.mismatched),
        )
        found = "; ".join(f"{verb} {in_short(names)}" for verb, names in kinds if names)
        cause, fix = self._cause()
        raise LayoutError(f"Stock transformers {found}. {cause}".strip(), fix)

    def _cause(self) -> tuple[str, str]:
        for parts, cause, fix in _CAUSES:
            if any(part in name for name in self.unexpected for part in parts):
                return cause, fix
        for name in self.unexpected:
            for wanted in self.missing:
                if name.endswith(f".{wanted}"):
                    prefix = name.removesuffix(wanted)
                    return f"All names begin with {prefix}, it seems.", f"Save the model without {prefix} in names."
        if self.missing and all(name.startswith("lm_head.") for name in self.missing):
            return (
                "The model was saved without its head, and config.json does not tie that to the embedding.",
                "Save the whole model, AutoModelForCausalLM, or correct tie_word_embeddings.",
            )
        return "", "The checkpoint is incomplete, or config.json belongs to another."


def match_stock(folder: Path, shapes: Mapping[str, Sequence[int]] | None) -> Match:
    """Compare a checkpoint with the stock class of its config.json, built without weights, and load its tokenizer.

    Stock code's own loader decides, with empty tensors in place of the weights: it renames and joins tensors on
    the way, and knows which may be left out.

    Args:
        folder: holds config.json of the transformers layout, and the tokenizer if there is one.
        shapes: of the tensors, by their names in that layout; None for those that are never loaded here. Those
            of a quantised checkpoint are not compared, but its quantiser must be at hand.

    Raises:
        CalibrationError: stock transformers cannot build the model, or load the tokenizer.
    """
    import torch
    from transformers import CONFIG_MAPPING, GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from calibrator.model import load_config, load_tokenizer
    from calibrator.quantised import is_quantised

    config_json = parse_json_object((folder / "config.json").read_bytes(), "config.json")
    if (model_type := config_json.get("model_type")) not in CONFIG_MAPPING:
        return Match(unknown=f"stock transformers knows no {model_type}")
    fix = "Correct config.json: its class takes no such values, or not together."
    config = load_config(folder, "config.json", fix)
    if (folder / "tokenizer.json").exists():
        # Others may need packages that are not installed, or code of their own.
        load_tokenizer(folder)
    if shapes is None:
        return Match()
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        config = config.get_text_config()
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return Match(unknown=f"stock transformers has no {config.model_type} language model")
    if is_quantised(getattr(config, "quantization_config", None)):
        return Match()
    advice = "Correct config.json: no model can be built with its values."
    with boundary("Stock transformers cannot build this model", CalibrationError, advice), torch.device("meta"):
        stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model = stock(config)
    advice = "Put generation_config.json right in the source, or take it out."
    # Where it cannot be read at all, stock code takes its entries from config.json.
    with boundary("Stock transformers cannot load it", CalibrationError, advice), suppress(OSError):
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    try:
        # Not documented, and so not counted on: without them, loading is what tells.
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        mapping: Any = get_model_conversion_mapping(model, None, None)
        loading = LoadStateDictConfig(
            device_map={"": "meta"},
            dtype=torch.float32,
            weight_mapping=mapping,
            ignore_mismatched_sizes=True,
        )
        tensors = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
        info, _ = model._load_pretrained_model(model, tensors, None, loading)
        found = model._finalize_model_loading(model, loading, info).to_dict()
    except Exception as error:
        return Match(unknown=f"this version of transformers cannot be asked ({type(error).__name__}: {error})")
    mismatched = [item if isinstance(item, str) else item[0] for item in found["mismatched_keys"]]
    return Match(sorted(found["missing_keys"]), sorted(found["unexpected_keys"]), sorted(mismatched))


def main() -> None:
    """Answer on stdout: a match, or the error."""
    try:
        answer: dict[str, Any] = asdict(match_stock(Path(sys.argv[1]), json.load(sys.stdin)))
    except MmodError as error:
        answer = {"error": error.message, "fix": error.fix}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
