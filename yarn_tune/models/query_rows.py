"""Where the rotated rows of every query head are in a projection or norm, by the layouts that model classes use.

Each function maps (config, rotary dimensions d) to row indices `[groups, d]`: groups are query heads, or 1 where all
heads share the weights of one norm.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedConfig

RowsOf = Callable[[PreTrainedConfig, int], Tensor]


def head_dim_of(config: PreTrainedConfig) -> int:
    """Dimensions of one head; with latent attention, those of its rotated part."""
    # Gemma 4 has another size in full-attention layers, and its config refuses to name one for all of them.
    per_layer = getattr(config, "is_heterogeneous", False)
    own = config.to_dict().get("head_dim") if per_layer else getattr(config, "head_dim", None)
    given = getattr(config, "qk_rope_head_dim", None) or own
    return int(given or config.hidden_size // config.num_attention_heads)


def _grid(starts: Tensor, dim: int) -> Tensor:
    return starts[:, None] + torch.arange(dim)


def separate(config: PreTrainedConfig, dim: int) -> Tensor:
    """A query projection (or norm across heads), head after head; also the first block of a fused [q; k; v]."""
    return _grid(torch.arange(config.num_attention_heads) * head_dim_of(config), dim)


def per_head(config: PreTrainedConfig, dim: int) -> Tensor:
    """[q, k, v] of head 0, then of head 1, ..."""
    return _grid(torch.arange(config.num_attention_heads) * 3 * head_dim_of(config), dim)


def gated(config: PreTrainedConfig, dim: int) -> Tensor:
    """[q, output gate] of head 0, then of head 1, ..."""
    return _grid(torch.arange(config.num_attention_heads) * 2 * head_dim_of(config), dim)


def shared(config: PreTrainedConfig, dim: int) -> Tensor:
    """One norm for every head."""
    return _grid(torch.zeros(1, dtype=torch.long), dim)


def falcon(config: PreTrainedConfig, dim: int) -> Tensor:
    """Groups of [queries, k, v] (new decoder), all queries first (multi-query), or per head."""
    heads, size = config.num_attention_heads, head_dim_of(config)
    if config.new_decoder_architecture:
        each = heads // config.num_kv_heads
        starts = torch.arange(heads) + 2 * (torch.arange(heads) // each)
        return _grid(starts * size, dim)
    return separate(config, dim) if config.multi_query else per_head(config, dim)


def latent(config: PreTrainedConfig, dim: int) -> Tensor:
    """DeepSeek's queries: in each head the unrotated part first."""
    size = config.qk_nope_head_dim + config.qk_rope_head_dim
    return _grid(torch.arange(config.num_attention_heads) * size + config.qk_nope_head_dim, dim)
