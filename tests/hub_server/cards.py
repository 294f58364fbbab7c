"""What the Hub makes of a card's front matter, and what it would refuse about it."""

from __future__ import annotations

import re
from typing import Any

import yaml

YAML_BLOCK = re.compile(r"^\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


def card_metadata(card: str) -> dict[str, Any]:
    """The front matter of a card; empty where there is none or it is no mapping."""
    block = YAML_BLOCK.search(card)
    data = yaml.safe_load(block.group(1)) if block else None
    return data if isinstance(data, dict) else {}


def metadata_problems(card: str) -> list[str]:
    """What the Hub would refuse about a card's front matter; empty when nothing."""
    block = YAML_BLOCK.search(card)
    if not block:
        return []
    try:
        data = yaml.safe_load(block.group(1))
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(data, dict):
        return ["YAML metadata must be a mapping"]
    problems = []
    for key in ("tags", "datasets"):
        value = data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            problems.append(f'"{key}" must be an array of strings')
    for key in ("license", "license_name", "library_name", "pipeline_tag", "base_model_relation"):
        if key in data and not isinstance(data[key], str):
            problems.append(f'"{key}" must be a string')
    models = data.get("base_model", [])
    for model in models if isinstance(models, list) else [models]:
        if not isinstance(model, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
            problems.append(f'"base_model" with value "{model}" is not valid. Use a model id')
    if data.get("license") == "other" and not data.get("license_name"):
        problems.append('"license_name" is required when "license" is "other"')
    for entry in data.get("model-index", []):
        for result in entry.get("results", []) if isinstance(entry, dict) and "name" in entry else [{}]:
            for key in ("task", "dataset", "metrics"):
                if key not in result:
                    problems.append(f'"model-index[0].results[0].{key}" is required')
            for metric in result.get("metrics", []):
                if "type" not in metric or "value" not in metric:
                    problems.append('"model-index[0].results[0].metrics[0].value" is required')
    return problems
