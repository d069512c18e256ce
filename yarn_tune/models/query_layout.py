"""Where each family's queries can be scaled before they are rotated: tensor names, rows, and which pair a row is in.

RoPE rotates q and k in pairs of rows. Whatever multiplies both rows of a pair of q by one number, or turns the pair by
one angle, commutes with the rotation, and so it can be learned beside it and folded into the checkpoint. Where the
query is normalised between projection and rotation, the norm's weight is the place; it is shared by the heads, unless
the norm is across all of them, and it can hold no turn. Where the norm comes after the rotation, or a clamp sits
between, nothing can be folded exactly, and the family is refused.

Shapes: `rows` is `[groups, d]`, groups being query heads, or 1 where they share a norm; `pairs` is `[d]`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..errors import UserError
from .families import FULL, INTERLEAVED, head_dim_of, layout_of


@dataclass(frozen=True)
class Indices:
    """A site's rows in a tensor of so many, on its device."""

    rows: Tensor
    """Index of each rotated row, group after group, `[groups * d]`."""
    pairs: Tensor
    """As `Site.pairs`, `[d]`."""
    partner: Tensor
    """Index of the other row of each row's pair; of a row that is not rotated, its own; `[rows]`."""
    sign: Tensor
    """With which that comes in where the pair is turned, `[groups * d]`."""


@dataclass(frozen=True)
class QuerySite:
    """Where one family's queries can be scaled before they are rotated."""

    pattern: re.Pattern[str]
    """Matches tensor names; group 1 is the layer, group `head` (if there is one) the head."""
    rows: Tensor
    """Index of each group's rotated rows in the first dimension (flattened, for a norm), `[groups, d]`."""
    pairs: Tensor
    """Which pair each of the d rotated rows belongs to, `[d]`."""
    layers: frozenset[int]
    """Layers that use the tuned table."""
    shift: float = 0.0
    """1 where the norm multiplies by 1 + weight."""
    _indices: dict[tuple[int, torch.device], "Indices"] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def groups(self) -> int:
        """Query heads, or 1 where they share a norm."""
        return self.rows.shape[0]

    @property
    def normed(self) -> bool:
        """Whether the place is a norm's weight, which can hold no turn of a pair."""
        return "norm" in self.pattern.pattern

    def holds(self, name: str) -> bool:
        """Whether a tensor of that name is to be scaled."""
        match = self.pattern.search(name)
        return match is not None and int(match[1]) in self.layers

    def gains_for(self, name: str, gains: Tensor) -> Tensor:
        """Those of one tensor, `[groups, d/2]`, out of `[tuned layers, groups, d/2]`."""
        match = self.pattern.search(name)
        assert match is not None
        own = gains[sorted(self.layers).index(int(match[1]))]
        if "head" in self.pattern.groupindex and own.shape[0] > 1:
            head = int(match["head"])
            return own[head : head + 1]
        return own

    def indices(self, rows: int, device: torch.device) -> Indices:
        """Where the rotated rows of a tensor of `rows` are; computed once, and not again in every forward."""
        if (rows, device) not in self._indices:
            self._indices[rows, device] = self._find(rows, device)
        return self._indices[rows, device]

    @torch.inference_mode(False)  # tensors made in such a mode can have no part in a gradient later
    def _find(self, rows: int, device: torch.device) -> Indices:
        order = self.pairs.argsort(stable=True).reshape(-1, 2)
        other, sign = torch.empty_like(self.pairs), torch.ones(self.pairs.shape)
        other[order[:, 0]], other[order[:, 1]], sign[order[:, 0]] = order[:, 1], order[:, 0], -1.0
        partner, own = torch.arange(rows), self.rows.reshape(-1)
        partner[own] = self.rows[:, other].reshape(-1)
        made = own, self.pairs, partner, sign.repeat(self.groups)
        return Indices(*(tensor.to(device) for tensor in made))


def scaled(x: Tensor, site: QuerySite, gains: Tensor) -> Tensor:
    """`x` with its rotated rows multiplied; differentiable, and computed at least in the precision of `gains`.

    A pair (first, second) is read as the complex number first + i second, which is how RoPE turns it.

    Args:
        x: `[..., rows]`.
        site: where the rotated rows are.
        gains: real or complex `[groups, d/2]`.
    """
    at = site.indices(x.shape[-1], x.device)
    own = gains[:, at.pairs].reshape(-1)
    real = torch.ones(x.shape[-1], dtype=own.real.dtype, device=x.device).index_put((at.rows,), own.real)
    if not gains.is_complex():
        return x * real
    imaginary = torch.zeros_like(real).index_put((at.rows,), own.imag * at.sign)
    return x * real + x[..., at.partner] * imaginary


def query_site(config: dict[str, Any]) -> QuerySite:
    """Where the temperature of this model can go.

    Raises:
        UserError: if it cannot be folded exactly, with the reason.
    """
    layout = layout_of(config)
    bare = CONFIG_MAPPING[layout.model_type].from_dict(config)
    kind, head_dim = layout.model_type, layout.head_dim
    if kind not in PLACES:
        raise UserError(f"folding: where {kind} scales its queries was not established; see export.stacks")
    names, rows_of = PLACES[kind]
    if getattr(bare, "clip_qkv", None):
        raise UserError(f"folding: this {kind} clamps its queries (clip_qkv) before rotating them, so it is not exact")
    normed = any(getattr(bare, key, False) for key in ("use_qk_norm", "qk_layernorm"))
    if normed:
        names, rows_of = QUERY_NORMS[kind]
    dim = _rotary_dim(bare, head_dim)
    half = torch.arange(dim // 2)
    pairs = half.repeat_interleave(2) if kind in INTERLEAVED else torch.cat([half, half])
    plus_one = kind in ("gemma3_text", "qwen3_next")
    return QuerySite(re.compile(names), rows_of(bare, dim), pairs, tuned_layers(bare), 1.0 if plus_one else 0.0)


def _rotary_dim(bare: PreTrainedConfig, head_dim: int) -> int:
    section = bare.rope_parameters
    section = section if "rope_theta" in section else section[FULL]
    return int(head_dim * section.get("partial_rotary_factor", 1.0))


def tuned_layers(config: PreTrainedConfig) -> frozenset[int]:
    """Layers whose queries are rotated with the table that is tuned."""
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or [FULL] * count
    if config.model_type in ("gemma3_text", "olmo3", "qwen3_next"):
        return frozenset(i for i in range(count) if kinds[i] == FULL)
    without = getattr(config, "no_rope_layers", None)
    if config.model_type == "smollm3" and without:
        return frozenset(i for i in range(count) if without[i])  # 1 means that the layer does rotate
    return frozenset(range(count))


# Where the rotated rows of every head are.

RowsOf = Callable[[PreTrainedConfig, int], Tensor]


def _grid(starts: Tensor, dim: int) -> Tensor:
    return starts[:, None] + torch.arange(dim)


def separate(config: PreTrainedConfig, dim: int) -> Tensor:
    """A query projection (or norm across heads), head after head; also the first block of a fused [q; k; v]."""
    return _grid(torch.arange(config.num_attention_heads) * head_dim_of(config), dim)


def per_head(config: PreTrainedConfig, dim: int) -> Tensor:
    """[q, k, v] of head 0, then of head 1, ..."""
    return _grid(torch.arange(config.num_attention_heads) * 3 * head_dim_of(config), dim)


def shared(config: PreTrainedConfig, dim: int) -> Tensor:
    """One norm for every head."""
    return _grid(torch.zeros(1, dtype=torch.long), dim)


def falcon(config: PreTrainedConfig, dim: int) -> Tensor:
    """Groups of [queries, k, v] (new decoder), all queries first (multi-query), or per head."""
    heads, size = config.num_attention_heads, head_dim_of(config)
    if config.new_decoder_architecture:
        groups = config.num_kv_heads
        each = heads // groups
        starts = torch.arange(heads) + 2 * (torch.arange(heads) // each)
        return _grid(starts * size, dim)
    return separate(config, dim) if config.multi_query else per_head(config, dim)


def latent(config: PreTrainedConfig, dim: int) -> Tensor:
    """DeepSeek's queries: in each head the unrotated part first."""
    size = config.qk_nope_head_dim + config.qk_rope_head_dim
    return _grid(torch.arange(config.num_attention_heads) * size + config.qk_nope_head_dim, config.qk_rope_head_dim)


Q_PROJ = r"layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)$"
Q_NORM = r"layers\.(\d+)\.self_attn\.q_norm\.weight$"
NEOX = r"layers\.(\d+)\.attention\.query_key_value\.(weight|bias)$"
FUSED = r"layers\.(\d+)\.self_attn\.query_key_value\.(weight|bias)$"

PLACES: dict[str, tuple[str, RowsOf]] = {
    **dict.fromkeys(
        (
            "arcee", "cohere", "ernie4_5", "gemma", "gemma2", "glm", "glm4", "gpt_oss", "granite",
            "granitemoe", "llama", "ministral", "mistral", "mixtral", "nemotron", "olmo", "phi", "qwen2", "qwen2_moe",
            "seed_oss", "smollm3", "stablelm", "starcoder2",
        ),
        (Q_PROJ, separate),
    ),
    **dict.fromkeys(("qwen3", "qwen3_moe", "qwen3_next", "exaone4", "gemma3_text"), (Q_NORM, shared)),
    **dict.fromkeys(("olmo2", "olmo3"), (Q_NORM, separate)),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), (r"layers\.(\d+)\.self_attn\.q(_b)?_proj\.weight$", latent)),
    "gpt_neox": (NEOX, per_head),
    "persimmon": (FUSED, per_head),
    "phi3": (r"layers\.(\d+)\.self_attn\.qkv_proj\.weight$", separate),
    "falcon": (r"h\.(\d+)\.self_attention\.query_key_value\.(weight|bias)$", falcon),
}  # fmt: skip
"""Model type -> tensor names and their rows. Families whose norm follows the rotation (HunYuan, Llama 4 with
qk-norm, NanoChat) are left out: there a temperature before it does nothing."""

Q_LAYERNORM = r"layers\.(\d+)\.self_attn\.q_layernorm\.(weight|bias)$"
QUERY_NORMS: dict[str, tuple[str, RowsOf]] = {
    "phi": (Q_LAYERNORM, shared),
    "persimmon": (Q_LAYERNORM, shared),
    "cohere": (Q_NORM, separate),
    "stablelm": (r"layers\.(\d+)\.self_attn\.q_layernorm\.norms\.(?P<head>\d+)\.weight$", shared),
}
"""The same where the config switches a norm of the queries on."""
