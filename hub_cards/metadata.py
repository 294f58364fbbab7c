"""The card's front matter: what the Hub indexes about a converted model, inherited, added and merged."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

from converter.lengths import format_length
from converter.manifest import Manifest, PerplexityTable

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "tags", "datasets")
LISTS = ("tags", "datasets")
TAGS = ("mamba", "long-context", "mmod")
MEASURED_BY = "mmod"

Metadata = dict[str, Any]


@dataclass(frozen=True)
class FrontMatter:
    """A card taken apart.

    Attributes:
        metadata: the YAML mapping at its top; empty if there is none.
        body: the Markdown below.
        block: the top as it is written, comments and all.
        problem: why the YAML at its top could not be used, else "".
    """

    metadata: Metadata
    body: str
    block: str = ""
    problem: str = ""


def split_card(card: str) -> FrontMatter:
    """Take the front matter off a card, by the Hub's own rule for where it ends.

    YAML that cannot be parsed, or that is no mapping, is left out and named as a problem.
    """
    card = card.removeprefix("\ufeff")
    if not card.lstrip().startswith("---"):
        return FrontMatter({}, card)
    # Loads the whole Hub client, which a card without front matter need not wait for.
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(card)
    if block is None:
        return FrontMatter({}, card)
    body, top = card[block.end() :], block.group(0)
    try:
        metadata = yaml.safe_load(block.group(2))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return FrontMatter({}, body, top, f"its front matter is no valid YAML ({' '.join(str(error).split())})")
    if metadata is None:
        return FrontMatter({}, body, top)
    if not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        return FrontMatter({}, body, top, "its front matter is no mapping of names")
    return FrontMatter(metadata, body, top)


def front_matter_block(metadata: Metadata) -> str:
    """The top of a card with this front matter."""
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)}---\n"


def inherited(source: Metadata) -> Metadata:
    """The fields of the source's card that hold for the converted model too, in usable form.

    A value of another type than the Hub allows is dropped. YAML reads the language ``no`` as false, which is put
    right.
    """
    found: Metadata = {}
    for key in INHERITED:
        value = source.get(key)
        if key == "language" or key in LISTS:
            items = value if isinstance(value, list) else [value]
            items = ["no" if item is False and key == "language" else item for item in items]
            value = [item for item in items if isinstance(item, str)]
        elif not isinstance(value, str):
            continue
        if value:
            found[key] = value
    return found


def card_metadata(manifest: Manifest, source: Metadata, model_name: str) -> Metadata:
    """The front matter of a converted model.

    Args:
        source: the front matter of the source's card at the commit that was converted.
        model_name: what ``model-index`` calls the converted model.
    """
    kept = inherited(source)
    first = ("license", "license_name", "license_link", "language")
    metadata: Metadata = {key: kept[key] for key in first if key in kept}
    source_model = manifest.source
    bases = [base.name for base in (source_model, manifest.scales_of) if base is not None and base.kind == "hub"]
    if bases:
        # The Hub knows finetune, adapter, merge and quantized; nothing nearer to "rescaled" than the first.
        relation = "quantized" if source_model.quantisation else "finetune"
        if manifest.scales_only:
            relation = "adapter"
        metadata |= {"base_model": bases if bases[1:] else bases[0], "base_model_relation": relation}
    runtime = source_model.quantisation if source_model.quantisation in ("gguf", "mlx") else "transformers"
    if not manifest.scales_only:
        metadata["library_name"] = runtime
    metadata["pipeline_tag"] = kept.get("pipeline_tag", "text-generation")
    metadata["tags"] = unique([*kept.get("tags", []), manifest.source.model_type, *TAGS])
    calibration = [dataset_id(text.name) for text in manifest.texts if text.role == "calibration"]
    if datasets := unique([*kept.get("datasets", []), *filter(None, calibration)]):
        metadata["datasets"] = datasets
    if manifest.perplexity is not None:
        metadata["metrics"] = ["perplexity"]
        metadata["model-index"] = model_index(manifest.perplexity, manifest.source.name, model_name)
    return metadata


def model_index(table: PerplexityTable, source_name: str, model_name: str) -> list[dict[str, Any]]:
    """Perplexity by length of the source and of the converted model, an entry each, the converted model last.

    The metrics' names differ too, for readers that take the last entry's name for all results.
    """
    entries: list[dict[str, Any]] = []
    for name, values, suffix in (
        (source_name, table.base, " (source, unscaled)"),
        (model_name, table.converted, ""),
    ):
        results = [
            EvalResult(
                task_type="text-generation",
                task_name="Text generation",
                dataset_type=dataset_id(table.text.name) or "text",
                dataset_name=table.text.name,
                dataset_args={"measured_by": MEASURED_BY, "span_tokens": table.span_tokens, "dtype": table.dtype},
                metric_type="perplexity",
                metric_name=f"Perplexity at {format_length(int(length))} tokens{suffix}",
                metric_value=round(value, 4),
            )
            for length, value in sorted(values.items(), key=lambda item: int(item[0]))
            if math.isfinite(value)
        ]
        if results:
            entries += eval_results_to_model_index(name, results)
    return entries


def merged(generated: Metadata, present: Metadata) -> Metadata:
    """Front matter to write over ``present``: what a person changed or added there stays, in its order.

    Lists are joined, results that were not measured by this tool are kept, and any other field that is present
    keeps its value, except those that the manifest decides.
    """
    decided = ("base_model", "base_model_relation", "library_name")
    result: Metadata = {}
    for key, value in generated.items():
        if key == "model-index":
            result[key] = [*value, *_other_results(present.get(key))]
        elif key in (*LISTS, "metrics") and isinstance(present.get(key), list):
            result[key] = unique([*present[key], *value])
        else:
            result[key] = value if key in decided else present.get(key, value)
    return {key: result.get(key, value) for key, value in present.items()} | result


def _other_results(present: Any) -> list[dict[str, Any]]:
    """The entries of a model-index, without what this tool measured."""
    kept = []
    for entry in present if isinstance(present, list) else []:
        if not isinstance(entry, dict) or not isinstance(entry.get("results"), list):
            continue
        others = [result for result in entry["results"] if not _is_ours(result)]
        if others:
            kept.append({**entry, "results": others})
    return kept


def _is_ours(result: Any) -> bool:
    dataset = result.get("dataset") if isinstance(result, dict) else None
    arguments = dataset.get("args") if isinstance(dataset, dict) else None
    return isinstance(arguments, Mapping) and arguments.get("measured_by") == MEASURED_BY


def dataset_id(text_name: str) -> str | None:
    """The Hub id of a text named ``org/dataset`` or ``org/dataset:split``, else None: file names hold no slash."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(:\S*)?", text_name)
    return found[1] if found else None


def unique(items: list[Any]) -> list[Any]:
    """The items in order, each once."""
    return [item for position, item in enumerate(items) if item not in items[:position]]
