"""Rotary embeddings in a config: the layout of a config.json, and the facts that training needs."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..errors import UserError
from ..rope import default_inv_freq, yarn_gain
from .base_scaling import Ramp, Scaling, scaling_of
from .families import FAMILIES, FULL, Family, family_of

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
"""Major and minor version of the installed transformers."""

ROPE_KEYS = {"rope_scaling", "rope_parameters", "rope_theta", "rope_local_base_freq", "partial_rotary_factor",
             "rotary_pct", "rotary_emb_base"}  # fmt: skip
"""Config keys about RoPE, as written by any release; families add their own."""


def head_dim_of(config: PreTrainedConfig) -> int:
    """Dimensions of one head; with latent attention, those of its rotated part.

    Raises:
        UserError: if the config does not give them.
    """
    # Gemma 4 has another head size in full-attention layers, and its config raises for a size of all layers.
    per_layer = getattr(config, "is_heterogeneous", False)
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


def text_section(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of the language model in a config.json: its nested text config where it wraps one, else all of it.

    Old checkpoints of some wrapped families have these keys at the top level; then those are returned, under the model
    type of the text model.
    """
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        nested = config.get("text_config")
        return nested if isinstance(nested, dict) else config
    whole = _bare(config)
    text = whole.get_text_config(decoder=True)
    if text is whole or whole.is_encoder_decoder:
        return config
    found = next((v for k, v in config.items() if isinstance(v, dict) and getattr(whole, k, None) is text), None)
    if found is None:
        found = {key: value for key, value in config.items() if key not in whole.sub_configs}
    return found | {"model_type": text.model_type}


def _bare(config: dict[str, Any]) -> PreTrainedConfig:
    """The config object without any rope key, at the top and in nested configs."""
    row = family_of(config.get("model_type", ""))
    # Without the window too, or a family whose default is YaRN warns that the two do not fit.
    left_out = {*ROPE_KEYS, row.theta_key, row.share_key, row.local_theta_key, "max_position_embeddings"}

    def stripped(part: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in part.items() if key not in left_out}
        return {key: stripped(value) if isinstance(value, dict) else value for key, value in kept.items()}

    return config_object(stripped(config))


def config_object(config: dict[str, Any]) -> PreTrainedConfig:
    """The config object of a config.json, or of the result of `to_dict`, which some classes do not accept unchanged."""
    kind = CONFIG_MAPPING[config["model_type"]]
    kept = {key: value for key, value in config.items() if not isinstance(getattr(kind, key, None), property)}
    # Infinities (Mamba's time steps) are objects in a file; transformers decodes them when it reads one.
    decode = getattr(kind, "_decode_special_floats", dict)
    return kind.from_dict(decode(copy.deepcopy(kept)))  # config classes write into the rope section they are given


def layout_of(config: dict[str, Any]) -> Layout:
    """The layout of a config.json, from the family's own config class; of the text model in a wrapped config.

    Raises:
        UserError: if the installed transformers lacks the model type, or the model has no RoPE.
    """
    text = text_section(config)
    kind = text.get("model_type", "")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"config.json: model_type {kind!r} is not supported by the installed transformers")
    bare, family = _bare(text), family_of(kind)
    sections = getattr(bare, "rope_parameters", None)
    if not sections:
        raise UserError(f"config.json: {kind} has no rotary position embeddings (RoPE)")
    by_kind = {"": sections} if "rope_theta" in sections else {k: v for k, v in sections.items() if v}
    first = next(iter(by_kind.values()))
    return Layout(
        family=family,
        head_dim=head_dim_of(bare),
        kinds=tuple(by_kind),
        thetas={each: float(section["rope_theta"]) for each, section in by_kind.items()},
        partial_rotary_factor=float(first.get("partial_rotary_factor", 1.0)),
        original=getattr(bare, "original_max_position_embeddings", None),
        interleaved=_interleaved(family, bare),
        rotated_apart=bool(getattr(bare, "qk_rope_head_dim", None)),
    )


def _interleaved(family: Family, config: PreTrainedConfig) -> bool:
    return family.interleaved and bool(getattr(config, family.interleaved_key or "model_type", True))


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
    """Read the rotary layout of a base model.

    Raises:
        UserError: if this model cannot be tuned, with the reason.
    """
    kind, family = config.model_type, family_of(config.model_type)
    if (reason := refusal(config)) is not None:
        raise UserError(f"base.model: {kind} cannot be tuned: {reason}")
    rope = config.rope_parameters
    layer_kind = "" if "rope_theta" in rope else FULL
    if layer_kind:
        if layer_kind not in config.layer_types:
            raise UserError(f"base.model: this {kind} has no full-attention layer, and only those can be extended")
        rope = rope[layer_kind]
    scaling = scaling_of(config, rope, layer_kind)
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
    head_dim = head_dim_of(config)
    partial = rope.get("partial_rotary_factor", 1.0)
    reach = scaling.ramp.reach if scaling and scaling.ramp else 0
    return RopeFacts(
        model_type=kind,
        theta=float(rope["rope_theta"]),
        dim=head_dim if getattr(config, "qk_rope_head_dim", None) else int(head_dim * partial),
        head_dim=head_dim,
        native=max(_stated_window(config), reach),
        partial_rotary_factor=partial,
        layer_kind=layer_kind,
        scaling=scaling,
        softmax_gain=softmax_gain(kind, dict(rope)),
        query_growth=_query_growth(family, dict(rope)),
        sliding_window=sliding_window,
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


def refusal(config: PreTrainedConfig) -> str | None:
    """The reason why no model with this config can be tuned; None if no reason is known."""
    family = family_of(config.model_type)
    if config.model_type in FAMILIES and family.refused:
        return family.refused
    if config.get_text_config() is not config:
        inner = config.get_text_config().model_type
        return f"it is multimodal; extract its language model (model type {inner}) from the checkpoint"
    if getattr(config, "alibi", False):
        return "its positions are ALiBi, not RoPE"
    if not family.refused and not getattr(config, "rope_parameters", None):
        return "its config has no rotary position embeddings (RoPE)"
    if family.refused:
        return family.refused
    if family.since > RELEASE:
        since = ".".join(map(str, family.since))
        return (
            f"it needs transformers {since} or newer, since older releases read its exports incorrectly; found "
            f"{transformers.__version__}"
        )
    return None


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


def logit_transform(config: PreTrainedConfig) -> Callable[[Tensor], Tensor] | None:
    """The family's transform of the product of hidden states and vocabulary matrix; None if it has none."""
    family = family_of(config.model_type)
    if family.logit_scale_key:
        return lambda logits: logits * getattr(config, family.logit_scale_key)
    if family.logit_divisor_key:
        return lambda logits: logits / getattr(config, family.logit_divisor_key)
    cap = getattr(config, "final_logit_softcapping", None)
    return None if cap is None else lambda logits: torch.tanh(logits / cap) * cap
