"""The keys and values that attention keeps from one piece of a text to the next, in stock transformers' own cache.

Stock code makes the mask of a piece, and finds what came before it, from a cache alone, so that every kind of
attention is served by the same few lines. Keys of earlier pieces are constants: no gradient flows through them.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, cache_utils
from transformers.masking_utils import create_causal_mask

# What stock forward methods call their cache: transformers 5.24 gave it a new name.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
CACHE_LAYERS = [kind for name, kind in inspect.getmembers(cache_utils, inspect.isclass) if "Layer" in name]
"""What stock transformers' cache is made of."""
# Tensors of a layer of stock transformers' cache (5.23), and which of their axes are the batch and the tokens.
_KEPT = {"keys": (0, -2), "values": (0, -2), "indexer_keys": (0, 1), "indexer_position_ids": (1, -1)}


@dataclass
class KeptKeys:
    """What attention keeps of a text.

    Attributes:
        layers: layers of a stock cache, by their number; those without attention are left out.
        position: tokens of the text so far, also those whose keys were dropped.
    """

    layers: dict[int, Any] = field(default_factory=dict)
    position: int = 0

    def repeated(self, size: int) -> KeptKeys:
        """One text's keys for ``size`` texts that go on from it."""
        layers = {number: copy.copy(layer) for number, layer in self.layers.items()}
        for layer in layers.values():
            for name, tensor in _tensors(layer).items():
                setattr(layer, name, tensor.repeat_interleave(size, dim=_KEPT[name][0]))
        return KeptKeys(layers, self.position)


class PieceCache(DynamicCache):
    """A stock cache that attention reads and extends while one piece of a text runs.

    A layer that runs again for the backward pass starts from the same keys as before, and adds nothing again.

    Args:
        config: of the model's text part.
        before: what attention kept of the text before the piece.
        most: tokens whose keys are kept after the piece; None for all. Sliding-window attention keeps no more than
            its window anyhow.

    Attributes:
        after: what is kept at the end of the piece.
    """

    def __init__(self, config: Any, before: KeptKeys, most: int | None) -> None:
        super().__init__(config=config)
        for number, layer in before.layers.items():
            self.layers[number] = copy.copy(layer)
        self.after = KeptKeys({}, before.position)
        self._start = before.position
        self._most = most
        self._added: set[tuple[str, int]] = set()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """The keys and values of a layer with those before the piece, as stock attention asks for them."""
        return self._extend("update", layer_idx, key_states, value_states)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Any:
        """The same for the keys by which attention chooses tokens."""
        return self._extend("update_indexer", layer_idx, indexer_key_states)

    def positions(self, tokens: Tensor) -> Tensor:
        """Positions of a piece's tokens (batch, length) in their text, of the same shape."""
        self.after.position = self._start + tokens.shape[1]
        return torch.arange(self._start, self.after.position, device=tokens.device).expand(tokens.shape)

    def _extend(self, method: str, number: int, *new: Tensor) -> Any:
        if (method, number) in self._added:
            return getattr(copy.copy(self.layers[number]), method)(*new)
        self._added.add((method, number))
        layer = self.after.layers.setdefault(number, copy.copy(self.layers[number]))
        result = getattr(layer, method)(*new)
        for name, tensor in _tensors(layer).items():
            setattr(layer, name, self._kept(name, tensor.detach(), layer.is_sliding))
        return result

    def _kept(self, name: str, tensor: Tensor, is_sliding: bool) -> Tensor:
        axis = _KEPT[name][1]
        if is_sliding or self._most is None or tensor.shape[axis] <= self._most:
            return tensor
        return tensor.narrow(axis, tensor.shape[axis] - self._most, self._most).clone()


def _tensors(layer: Any) -> dict[str, Tensor]:
    found = {name: getattr(layer, name, None) for name in _KEPT}
    return {name: tensor for name, tensor in found.items() if torch.is_tensor(tensor)}
