"""Rotary embeddings in a config: the layout of a config.json, and the facts that training needs."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import UserError
from ..rope import BETA_FAST, BETA_SLOW, default_inv_freq, yarn_gain
from .families import FULL, Family, family_of
from .wrappers import bare_config, refusal, text_section

CONTINUED = ("llama3", "yarn", "longrope", "linear")
"""Types of scaling in a base's config that training continues from; its table is that of transformers' functions."""


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """Parameters of the YaRN in a base's config; a longer window changes only the factor."""

    factor: float
    original: int
    """Window in tokens within which the betas count rotations."""
    beta_fast: float
    beta_slow: float
    truncate: bool

    @property
    def reach(self) -> int:
        """The window that this YaRN extends to."""
        return round(self.factor * self.original)


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """The table and multiplier in a base's config."""

    rope_type: str
    inv_freq: tuple[float, ...]
    """Inverse frequencies for prompts of more than `above` tokens."""
    attention_factor: float
    short_inv_freq: tuple[float, ...] | None = None
    """Inverse frequencies for shorter prompts, where they differ (longrope)."""
    above: int = 0
    ramp: Ramp | None = None

    def table(self, length: int) -> tuple[Tensor, float]:
        """Inverse frequencies and multiplier of the base for a prompt of `length` tokens."""
        short = self.short_inv_freq is not None and length <= self.above
        return torch.tensor(self.short_inv_freq if short else self.inv_freq), self.attention_factor

    def digest(self) -> str:
        """A short identifier of the table; numbers learned with one table do not fit another."""
        content = repr((self.inv_freq, self.short_inv_freq, self.attention_factor)).encode()
        return f"{self.rope_type} {hashlib.sha256(content).hexdigest()[:12]}"


def scaling_of(config: PreTrainedConfig, section: dict[str, Any], layer_kind: str) -> Scaling | None:
    """The scaling in a base's rope section; None where it is plain RoPE.

    Raises:
        UserError: if it cannot be continued, with the reason.
    """
    kind = section["rope_type"]
    if kind == "default":
        return None
    if kind not in CONTINUED:
        reason = "depends on the prompt length" if kind == "dynamic" else "is not supported"
        raise UserError(
            f"base.model: its config has rope_type {kind!r}, which {reason}; supported types: {', '.join(CONTINUED)}. "
            "Remove the scaling from a copy of its config.json to start from plain RoPE"
        )
    compute = ROPE_INIT_FUNCTIONS[kind]
    above = int(section.get("original_max_position_embeddings") or config.max_position_embeddings)
    options = {"layer_type": layer_kind} if layer_kind else {}
    long, attention_factor = compute(config, torch.device("cpu"), seq_len=above + 1, **options)
    short = None
    if kind == "longrope":
        table, _ = compute(config, torch.device("cpu"), seq_len=above, **options)
        short = None if table.equal(long) else tuple(table.tolist())
    return Scaling(
        rope_type=kind,
        inv_freq=tuple(long.tolist()),
        attention_factor=float(attention_factor),
        short_inv_freq=short,
        above=above if short else 0,
        ramp=_ramp(section, above, config.max_position_embeddings) if kind == "yarn" else None,
    )


def _ramp(section: dict[str, Any], original: int, longest: int) -> Ramp:
    factor = section.get("factor")
    return Ramp(
        factor=float(longest / original if factor is None else factor),
        original=original,
        beta_fast=float(section.get("beta_fast") or BETA_FAST),
        beta_slow=float(section.get("beta_slow") or BETA_SLOW),
        truncate=bool(section.get("truncate", True)),
    )


def head_dim_of(config: PreTrainedConfig, full: bool = False) -> int:
    """Dimensions of one head; with latent attention, those of its rotated part.

    With `full`, those in full-attention layers, whose heads are larger in Gemma 4.

    Raises:
        UserError: if the config does not give them.
    """
    per_layer = getattr(config, "is_heterogeneous", False)
    if per_layer and full and FULL in config.layer_types:
        return int(config.per_layer_config[config.layer_types.index(FULL)].head_dim)
    own = config.to_dict().get("head_dim") if per_layer else getattr(config, "head_dim", None)
    given = getattr(config, "qk_rope_head_dim", None) or own
    try:
        return int(given or config.hidden_size // config.num_attention_heads)
    except AttributeError as error:
        raise UserError(f"config.json: {config.model_type} has no head size (head_dim)") from error


@dataclass(frozen=True)
class Layout:
    """The shape of a model's rotary embeddings, without any rope key."""

    family: Family
    head_dim: int
    """Dimensions of one head; with latent attention, those of its rotated part."""
    kinds: tuple[str, ...]
    """Kinds of layers with tables of their own; `("",)` where all layers share one."""
    thetas: dict[str, float]
    """The family's own theta by kind, which readers fall back to."""
    partial_rotary_factor: float
    """The family's default of the share of each head that is rotated."""
    original: int | None = None
    """`original_max_position_embeddings` at the top level of the config (Phi-3 has it there)."""
    interleaved: bool = False
    """Whether the pairs are neighbours (2i, 2i + 1); elsewhere pair i is (i, i + d/2)."""
    full_head_dim: int = 0
    """`head_dim` in full-attention layers."""
    rotated_apart: bool = False
    """Whether `head_dim` counts only the rotated part, so that no share of it applies."""

    @property
    def model_type(self) -> str:
        """The model type of the text model."""
        return self.family.model_type

    @property
    def nested(self) -> bool:
        """Whether the rope section has one part per kind of layer."""
        return self.kinds != ("",)

    def rotary_dim(self, share: float) -> int:
        """Rotated dimensions of one head, if a config gives `share` as its rotated share."""
        return self.head_dim if self.rotated_apart else int(self.head_dim * share)


def layout_of(config: dict[str, Any]) -> Layout:
    """The layout of a config.json, from the family's own config class; of the text model in a wrapped config.

    Raises:
        UserError: if the installed transformers lacks the model type, or the model has no RoPE.
    """
    text = text_section(config)
    kind = text.get("model_type", "")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"config.json: model_type {kind!r} is not supported by the installed transformers")
    bare, family = bare_config(text), family_of(kind)
    sections = getattr(bare, "rope_parameters", None)
    if not sections:
        raise UserError(f"config.json: {kind} has no rotary position embeddings (RoPE)")
    by_kind = {"": sections} if "rope_theta" in sections else {k: v for k, v in sections.items() if v}
    first = next(iter(by_kind.values()))
    return Layout(
        family=family,
        head_dim=head_dim_of(bare),
        full_head_dim=head_dim_of(bare, full=True),
        kinds=tuple(by_kind),
        thetas={each: float(section["rope_theta"]) for each, section in by_kind.items()},
        partial_rotary_factor=float(first.get("partial_rotary_factor", 1.0)),
        original=getattr(bare, "original_max_position_embeddings", None),
        interleaved=_interleaved(family, bare),
        rotated_apart=bool(getattr(bare, "qk_rope_head_dim", None)),
    )


def _interleaved(family: Family, config: PreTrainedConfig) -> bool:
    return family.interleaved and bool(getattr(config, family.interleaved_key or "model_type", True))


KEPT = ("mrope_section", "mrope_interleaved")
"""Keys of a rope section beside those of the table: which axis of an image rotates which pairs."""


@dataclass(frozen=True, kw_only=True)
class RopeFacts:
    """Facts about the rotary embeddings of a base model, from its config."""

    model_type: str
    theta: float
    dim: int
    """Rotary dimensions of one head; d/2 pairs."""
    head_dim: int
    native: int
    """The base's window in tokens: `max_position_embeddings`, or what its YaRN extends to."""
    partial_rotary_factor: float
    layer_kind: str = ""
    """The kind of layers these facts are about; empty where all layers share one table."""
    scaling: Scaling | None = None
    """The scaling in its config; None for plain RoPE."""
    softmax_gain: float = 1.0
    """Additional factor of the base on all attention logits (DeepSeek's mscale_all_dim)."""
    query_growth: tuple[float, int] | None = None
    """(beta, O): queries at position p are multiplied by 1 + beta ln(1 + floor(p / O)); None where they are not."""
    sliding_window: int | None = None
    """Number of tokens that the layer with the longest sliding window attends to; None for all tokens."""

    theta_only: bool = False
    """`Family.theta_only`; `theta` is then the config's to the power of the rotated share."""
    kept: tuple[tuple[str, Any], ...] = ()
    """Keys of its rope section, and their values, that an export must keep (`KEPT`)."""

    @property
    def ramp(self) -> Ramp | None:
        """The YaRN in its config; None if it has another scaling or none."""
        return self.scaling.ramp if self.scaling else None

    def table(self, length: int) -> tuple[Tensor, float]:
        """Inverse frequencies `[d/2]` and multiplier of cos and sin of the unchanged base for a prompt of `length`."""
        if self.scaling is not None:
            return self.scaling.table(length)
        return default_inv_freq(self.theta, self.dim), 1.0


def rope_facts(config: PreTrainedConfig) -> RopeFacts:
    """Read the rotary layout of a base model, in a wrapper that of its language model.

    Raises:
        UserError: if this model cannot be tuned, with the reason.
    """
    if (reason := refusal(config)) is not None:
        raise UserError(f"base.model: {config.model_type} cannot be tuned: {reason}")
    config = config.get_text_config()
    kind, family = config.model_type, family_of(config.model_type)
    rope = config.rope_parameters
    layer_kind = "" if "rope_theta" in rope else FULL
    if layer_kind:
        if layer_kind not in config.layer_types:
            raise UserError(f"base.model: this {kind} has no full-attention layer, and only those can be extended")
        rope = rope[layer_kind]
    scaling = None if family.theta_only else scaling_of(config, rope, layer_kind)
    if family.theta_only and (rope["rope_type"] != "proportional" or rope.get("factor", 1.0) != 1.0):
        raise UserError(f"base.model: this {kind} has another RoPE in full-attention layers than its releases: {rope}")
    sliding_window = None if layer_kind else _sliding_window(config)
    if family.sliding_needed and has_sliding_layers(config):
        raise UserError(
            f"base.model: full-attention layers of this {kind} have no positions, so no change of RoPE extends it"
        )
    if sliding_window is not None and sliding_window < config.max_position_embeddings:
        raise UserError(
            f"base.model: layers of this {kind} attend to the last {sliding_window} tokens only (sliding window), "
            "which no change of RoPE extends"
        )
    if family.scaled_only and scaling is None:
        raise UserError(
            f"base.model: this {kind} has no RoPE scaling in its config, and transformers computes its unscaled table "
            "over the whole head instead of its rotated part"
        )
    head_dim = head_dim_of(config, full=family.theta_only)
    partial = rope.get("partial_rotary_factor", 1.0)
    reach = scaling.ramp.reach if scaling and scaling.ramp else 0
    return RopeFacts(
        model_type=kind,
        theta=float(rope["rope_theta"]) ** (partial if family.theta_only else 1.0),
        dim=head_dim if getattr(config, "qk_rope_head_dim", None) else int(head_dim * partial),
        head_dim=head_dim,
        native=max(_stated_window(config), reach),
        partial_rotary_factor=partial,
        layer_kind=layer_kind,
        scaling=scaling,
        softmax_gain=softmax_gain(kind, dict(rope)),
        query_growth=_query_growth(family, dict(rope)),
        sliding_window=sliding_window,
        theta_only=family.theta_only,
        kept=tuple((key, rope[key]) for key in KEPT if key in rope),
    )


def _query_growth(family: Family, section: dict[str, Any]) -> tuple[float, int] | None:
    """The growth of queries with the position; raises `UserError` where transformers could not compute it."""
    if not family.query_growth:
        return None
    keys = ("llama_4_scaling_beta", "original_max_position_embeddings")
    for key in keys:
        if section.get(key) is None:
            raise UserError(
                f"base.model: {key} is missing in the rope section of this {family.model_type}, and transformers "
                "cannot run it without that key; write the number that the model was trained with"
            )
    return float(section[keys[0]]), int(section[keys[1]])


def _stated_window(config: PreTrainedConfig) -> int:
    """The window that a config states; Command-R's is under model_max_length, as vLLM reads it."""
    own = getattr(config, "model_max_length", None) if config.model_type.startswith("cohere") else None
    return int(own or config.max_position_embeddings)


def softmax_gain(kind: str, section: dict[str, Any]) -> float:
    """The factor of latent attention on its logits, over all dimensions of a head, for a rope section."""
    factor, weight = section.get("factor"), section.get("mscale_all_dim")
    if not family_of(kind).latent or section.get("rope_type") in (None, "default") or not weight or not factor:
        return 1.0
    return yarn_gain(factor, weight) ** 2


def has_sliding_layers(config: PreTrainedConfig) -> bool:
    """Whether the config names layers that attend within a sliding window."""
    return "sliding_attention" in (getattr(config, "layer_types", None) or ())


def _sliding_window(config: PreTrainedConfig) -> int | None:
    """Tokens that the layer with the longest sliding window attends to; None for all of them."""
    kinds = getattr(config, "layer_types", None)
    used = getattr(config, "use_sliding_window", True) if kinds is None else FULL not in kinds
    return (getattr(config, "sliding_window", None) or None) if used else None
