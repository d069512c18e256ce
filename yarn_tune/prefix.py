"""Prefix rows: the far context is read without a gradient, and only the last tokens of a row are trained.

The first tokens of a row run as for inference, over a KV cache. The last n tokens then run with a gradient, their
queries seeing the whole window. Cached keys are rotated already; turning one further by its position times a change of
frequency is what that change would have done, so the gradient through the rotation of every key is exact, while its
value stays as cached. What is left out is the gradient through the prefix's own hidden states.

Memory is that of reading the prefix, plus activations of n tokens over the keys and values of all.

Shapes: b rows, T tokens a row, n of them trained, h hidden size; cached keys are `[b, kv heads, T - n, head_dim]`.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .families import INTERLEAVED
from .objectives import hidden_states
from .queries import tuned_layers
from .tunable import TunableRotary


class _Turned(torch.autograd.Function):
    """Rotated keys as they are, differentiable in the frequencies and in the multiplier of cos and sin."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, inv_freq: Tensor, multiplier: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(keys, inv_freq, multiplier)
        ctx.interleaved = interleaved
        return keys.view_as(keys)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, None]:
        """Of a pair (x, y) at position m: d/dw = m (-y, x), d/da = (x, y) / a."""
        keys, inv_freq, multiplier = ctx.saved_tensors
        pairs = len(inv_freq)
        x, y = _pairs(keys, pairs, ctx.interleaved)
        gx, gy = _pairs(gradients[0], pairs, ctx.interleaved)
        positions = torch.arange(keys.shape[-2], device=keys.device, dtype=torch.float32)
        turning = (gy * x - gx * y).sum((0, 1))  # [T - n, d/2]
        growing = ((gx * x).sum() + (gy * y).sum()) / multiplier
        return None, positions @ turning, growing.reshape(multiplier.shape), None


def _pairs(keys: Tensor, pairs: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Both members of every rotated pair, float32 `[b, kv heads, T - n, d/2]`; rotated dimensions come first."""
    rotated = keys[..., : 2 * pairs].float()
    if interleaved:
        return rotated[..., 0::2], rotated[..., 1::2]
    return rotated[..., :pairs], rotated[..., pairs:]


class _PrefixLayer(DynamicLayer):
    """One layer's prefix; `update` gives all keys and values and keeps nothing."""

    def __init__(self, keys: Tensor, values: Tensor, rotary: TunableRotary, interleaved: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._rotary, self._interleaved = rotary, interleaved

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Those of the prefix, then the new ones."""
        inv_freq, multiplier = self._rotary.table()
        keys = _Turned.apply(self.keys, inv_freq, multiplier, self._interleaved)  # type: ignore[no-untyped-call]
        return torch.cat([keys, key_states], -2), torch.cat([self.values, value_states], -2)  # type: ignore[list-item]


def tail_states(model: PreTrainedModel, rotary: TunableRotary, input_ids: Tensor, tail: int) -> Tensor:
    """Last hidden states `[b, tail, h]` of rows `[b, T]` at positions 0 to T - 1, as the module docstring says.

    Args:
        model: with `rotary` attached, and without gradient checkpointing (which drops KV caches).
        rotary: the learned numbers.
        input_ids: whole rows.
        tail: tokens at the end of each row that are trained.
    """
    prefix = input_ids.shape[1] - tail
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        hidden_states(model, input_ids[:, :prefix], cache=cache)
    interleaved = model.config.model_type in INTERLEAVED
    tuned = tuned_layers(model.config)
    for index, layer in enumerate(cache.layers):
        if index in tuned and type(layer) is DynamicLayer:
            cache.layers[index] = _PrefixLayer(layer.keys, layer.values, rotary, interleaved)  # type: ignore[arg-type]
    positions = torch.arange(prefix, input_ids.shape[1], device=input_ids.device).expand(len(input_ids), -1)
    return hidden_states(model, input_ids[:, prefix:], positions, cache=cache)
