"""Where the queries of a model can be scaled before they are rotated: tensor names, rows, and the pair of each row.

RoPE rotates q and k in pairs of rows. Multiplying both rows of a pair of q by one number, or rotating the pair by one
angle, commutes with RoPE, so it can be learned apart from RoPE and folded into the checkpoint. Where the query is
normalised between projection and rotation, the norm's weight is scaled instead; heads share it, unless the norm is
across all of them, and it cannot hold a rotation. Where the norm follows the rotation, or queries are clamped in
between, nothing can be folded exactly.

Shapes: `rows` is `[groups, d]`, groups being query heads, or 1 where they share a norm; `pairs` is `[d]`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import UserError
from .families import FULL, Rows, family_of
from .rope_config import Layout, head_dim_of, layout_of
from .wrappers import WRAPPERS, config_object, text_section


@dataclass(frozen=True)
class Indices:
    """Indices of a site's rows in a tensor with a given number of rows, on its device."""

    rows: Tensor
    """Index of each rotated row, group after group, `[groups * d]`."""
    pairs: Tensor
    """`QuerySite.pairs` on this device, `[d]`."""
    partner: Tensor
    """Index of the other row of each row's pair; a row that is not rotated has its own index; `[rows]`."""
    sign: Tensor
    """Sign of the other row's contribution to a rotation of the pair, `[groups * d]`."""


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

    @cached_property
    def width(self) -> int:
        """The smallest number of rows that a tensor of queries can have."""
        return int(self.rows.max()) + 1

    @property
    def normed(self) -> bool:
        """Whether queries are scaled in a norm's weight, which cannot hold a rotation of a pair."""
        return "norm" in self.pattern.pattern

    def holds(self, name: str) -> bool:
        """Whether a tensor of that name is to be scaled."""
        match = self.pattern.search(name)
        return match is not None and int(match[1]) in self.layers

    def gains_for(self, name: str, gains: Tensor) -> Tensor:
        """The gains of one tensor, `[groups, d/2]`, from those of all, `[tuned layers, groups, d/2]`."""
        match = self.pattern.search(name)
        assert match is not None
        own = gains[sorted(self.layers).index(int(match[1]))]
        if "head" in self.pattern.groupindex and own.shape[0] > 1:
            head = int(match["head"])
            return own[head : head + 1]
        return own

    def indices(self, rows: int, device: torch.device) -> Indices:
        """Indices of the rotated rows in a tensor of `rows` rows; computed once and then kept."""
        if (rows, device) not in self._indices:
            self._indices[rows, device] = self._find(rows, device)
        return self._indices[rows, device]

    @torch.inference_mode(False)  # tensors made in inference mode cannot be used by autograd later
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

    A pair (first, second) is treated as the complex number first + i second, as RoPE does.

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


SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
         "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
"""Keys that a config may omit, and whose defaults differ between twins."""


def as_twin(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the family that computes the same with the same tensors: a Mistral as a Llama.

    Raises:
        UserError: if there is no such family, or the model attends within a sliding window.
    """
    kind = config.get("model_type", "")
    family = family_of(kind)
    if not family.twin:
        raise UserError(
            f"export.as_llama: true, but {kind or 'this model'} does not compute what a Llama computes from the same "
            "tensors (only a mistral without a sliding window does); set it to false"
        )
    own = config_object(config)
    if own.sliding_window is not None:
        raise UserError(
            f"export.as_llama: this {kind} attends within a sliding window of {own.sliding_window} tokens, which a "
            "Llama does not; set it to false"
        )
    filled = {key: getattr(own, key) for key in SHAPE} | config
    names = {"model_type": family.twin, "architectures": ["LlamaForCausalLM"]}
    return {key: value for key, value in filled.items() if key != "sliding_window"} | names


def query_site(config: dict[str, Any]) -> QuerySite:
    """Where the queries of this model can be scaled.

    Args:
        config: config.json.

    Raises:
        UserError: if a scale cannot be folded exactly, with the reason.
    """
    layout = layout_of(config)
    family, bare = layout.family, config_object(text_section(config))
    place = family.queries
    if place is None:
        raise UserError(f"folding: it is not known where to scale queries of {layout.model_type}; see export.stacks")
    if getattr(bare, "clip_qkv", None):
        raise UserError(
            f"folding: this {layout.model_type} clamps its queries (clip_qkv) before the rotation; folding is not exact"
        )
    if family.query_norm is not None and any(getattr(bare, key, False) for key in family.norm_keys):
        place = family.query_norm
    dim = _rotary_dim(bare, layout)
    half = torch.arange(dim // 2)
    pairs = half.repeat_interleave(2) if layout.interleaved else torch.cat([half, half])
    rows = ROWS[place.rows](bare, dim)
    if family.theta_only:  # pair i of the head is (i, i + head / 2), though only the first pairs rotate
        rows = rows + (layout.full_head_dim - dim) // 2 * (torch.arange(dim) >= dim // 2)
    row = WRAPPERS.get(config.get("model_type", ""))
    pattern = row.anchored(place.pattern) if row else place.pattern
    return QuerySite(re.compile(pattern), rows, pairs, tuned_layers(bare), family.norm_shift)


def _rotary_dim(bare: PreTrainedConfig, layout: Layout) -> int:
    section = bare.rope_parameters
    section = section if "rope_theta" in section else section[FULL]
    share = section.get("partial_rotary_factor", 1.0)
    return int(layout.full_head_dim * share) if layout.family.theta_only else layout.rotary_dim(share)


def tuned_layers(config: PreTrainedConfig) -> frozenset[int]:
    """Layers whose queries are rotated with the tuned table."""
    count, family = config.num_hidden_layers, family_of(config.model_type)
    kinds, switched = getattr(config, "layer_types", None), getattr(config, family.tuned_key or "", None)
    if family.tuned_kind and kinds:
        return frozenset(i for i in range(count) if kinds[i] == family.tuned_kind)
    return frozenset(i for i in range(count) if not switched or switched[i])


# Rows of the rotated part of every head, from (config, rotary dimensions d): `[groups, d]`.


def _grid(starts: Tensor, dim: int) -> Tensor:
    return starts[:, None] + torch.arange(dim)


def separate(config: PreTrainedConfig, dim: int) -> Tensor:
    """A query projection (or norm across heads), head after head; also the first block of a fused [q; k; v]."""
    return _grid(torch.arange(config.num_attention_heads) * head_dim_of(config), dim)


def per_head(config: PreTrainedConfig, dim: int) -> Tensor:
    """A fused projection: [q, k, v] of head 0, then of head 1, ..."""
    return _grid(torch.arange(config.num_attention_heads) * 3 * head_dim_of(config), dim)


def shared(config: PreTrainedConfig, dim: int) -> Tensor:
    """One norm that all heads share."""
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
    """DeepSeek's query projection: the unrotated part of each head precedes the rotated part."""
    size = config.qk_nope_head_dim + config.qk_rope_head_dim
    return _grid(torch.arange(config.num_attention_heads) * size + config.qk_nope_head_dim, dim)


ROWS: dict[Rows, Callable[[PreTrainedConfig, int], Tensor]] = {
    "separate": separate,
    "per_head": per_head,
    "shared": shared,
    "falcon": falcon,
    "latent": latent,
}
