"""A minimal implementation of the same step without yarn_tune, as a reference for its cost.

One log factor per rotary pair, a log temperature, and a log gain and a phase per layer, head and pair of a Llama. Cos
and sin are computed from the parameters; queries are scaled and turned by a hook on `q_proj`; the loss is the sum of
next-token NLL over chunks of 1024 tokens, recomputed in the backward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Rotary(nn.Module):
    """Cos and sin of Llama's layout from learned frequencies."""

    def __init__(self, inv_freq: Tensor, layers: int, heads: int) -> None:
        super().__init__()
        pairs = len(inv_freq)
        self.register_buffer("inv_freq", inv_freq.float())
        self.log_factor = nn.Parameter(torch.zeros(pairs))
        self.log_temperature = nn.Parameter(torch.zeros(1))
        self.log_gain = nn.Parameter(torch.zeros(layers, heads, pairs))
        self.phase = nn.Parameter(torch.zeros(layers, heads, pairs))

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin `[1, n, head_dim]` in the dtype of `x`."""
        angles = position_ids[..., None].float() * (self.inv_freq * torch.exp(-self.log_factor))
        angles = torch.cat([angles, angles], -1)
        multiplier = torch.exp(-0.5 * self.log_temperature)
        return (angles.cos() * multiplier).to(x.dtype), (angles.sin() * multiplier).to(x.dtype)


def prepare(model: Any) -> Rotary:
    """Freeze a Llama, replace its rotary module, and hook its query projections."""
    model.requires_grad_(False)
    config = model.config
    rotary = Rotary(model.model.rotary_emb.inv_freq, config.num_hidden_layers, config.num_attention_heads)
    rotary.to(model.device)
    model.model.rotary_emb = rotary
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_hook(_turn(rotary, index, config.num_attention_heads))
    return rotary


def _turn(rotary: Rotary, layer: int, heads: int) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        gain, phase = rotary.log_gain[layer].exp(), rotary.phase[layer]
        real, imaginary = gain * phase.cos(), gain * phase.sin()
        first, second = output.unflatten(-1, (heads, -1)).chunk(2, -1)
        turned = torch.cat([first * real - second * imaginary, second * real + first * imaginary], -1)
        return turned.flatten(-2).to(output.dtype)

    return hook


def loss(model: Any, ids: Tensor) -> Tensor:
    """Summed NLL of a row `[1, n + 1]`."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[0]
    head = model.get_output_embeddings()

    def nll(part: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(part).float(), labels, reduction="sum")

    pairs = zip(hidden.split(1024), ids[0, 1:].split(1024), strict=True)
    return torch.stack([checkpoint(nll, part, labels, use_reentrant=False) for part, labels in pairs]).sum()
