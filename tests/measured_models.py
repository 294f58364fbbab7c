"""Models that measures are tested on: the bundled demos, tiny random ones, and one that answers by a script."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from calibrator.model import StockModel, load_model
from converter.baking import bake
from converter.commands.console import Console
from converter.layouts import read_checkpoint
from converter.scales import ScaleSet, auto_granularity
from converter.source import resolve
from tests.tiny_models import tiny_model

QUIET = Console(quiet=True)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def demo_folder(name: str, folder: Path, factor: float = 1.0) -> Path:
    """A bundled demo in the transformers layout with one factor on every A."""
    checkpoint = read_checkpoint(resolve(name, compose=True))
    shapes = {key: tensor.shape for key, tensor in checkpoint.A_log.items()}
    scales = ScaleSet.ones(shapes, auto_granularity(next(iter(shapes.values()))), "linear")
    for log_s in scales.log_s.values():
        log_s[:] = np.log(factor)
    folder.mkdir(parents=True)
    bake(checkpoint, folder, scales=None if factor == 1 else scales, reporter=QUIET)
    return folder


def load(folder: Path, trust_a_log: bool = False) -> StockModel:
    """Load a folder in the transformers layout on the CPU in float32."""
    checkpoint = read_checkpoint(resolve(str(folder), compose=True), trust_a_log=trust_a_log)
    return load_model(folder, checkpoint.A_log, device=torch.device("cpu"), dtype=torch.float32)


def tiny_stock(model_type: str, folder: Path) -> StockModel:
    """A tiny random model of an architecture, loaded from files; its tokenizer belongs to another."""
    tiny_model(model_type).save_pretrained(folder)
    demo = resolve("demo", compose=True).folder
    for name in TOKENIZER_FILES:
        shutil.copy(demo / name, folder / name)
    return load(folder)


def random_tokens(rows: int, length: int, vocabulary: int = 256, seed: int = 0) -> Tensor:
    """Token ids (rows, length)."""
    return torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


class ScriptedConfig(PretrainedConfig):
    """What transformers asks of any model's config."""

    model_type = "scripted"


class ScriptedModel(PreTrainedModel, GenerationMixin):
    """Knows the answer: says the last pass key of the text, as far back as it remembers.

    Args:
        tokenizer: whose tokens it reads and says.
        memory: tokens at the end of a prompt that it has not forgotten; None for all.
        fact: how a text tells a key. asked: how a prompt ends.
    """

    config_class = ScriptedConfig

    def __init__(
        self, tokenizer: Any, memory: int | None = None, fact: str = r"pass key is (\d{5})", asked: str = "Answer:"
    ) -> None:
        super().__init__(ScriptedConfig(vocab_size=len(tokenizer), num_hidden_layers=1))
        self.anchor = nn.Parameter(torch.zeros(1))
        self.tokenizer = tokenizer
        self.memory = memory
        self.fact, self.asked = fact, asked

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        """Scores (batch, length, vocabulary) that are right at the last position alone."""
        scores = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, tokens in enumerate(input_ids):
            ends = (n for n in range(len(tokens)) if self._reads(tokens[: len(tokens) - n]).endswith(self.asked))
            done = next(ends, 0)
            prompt = tokens[: len(tokens) - done]
            seen = self._reads(prompt if self.memory is None else prompt[-self.memory :])
            found = re.findall(self.fact, seen)
            answer = self.tokenizer(f" {found[-1]}." if found else " nothing.", add_special_tokens=False).input_ids
            answer.append(self.tokenizer.eos_token_id)
            scores[row, -1, answer[min(done, len(answer) - 1)]] = 10.0
        return CausalLMOutput(logits=scores)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Every step reads the whole text again, with or without a cache."""
        return {"input_ids": input_ids}

    def _reads(self, tokens: Tensor) -> str:
        return str(self.tokenizer.decode(tokens))
