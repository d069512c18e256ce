"""What we know about Hugging Face model classes, in one table; what is not in it is refused with the reason.

In all families here a single `*RotaryEmbedding` module below the base model computes cos and sin for every layer.
Most compute them from one `inv_freq` buffer, which sliding layers share where there are any. Where layers differ by
kind (Gemma 3, OLMo 3), the module holds one table a kind, and only that of the full-attention layers is tuned: the
others look back through a sliding window, which no change of RoPE extends. Models that slide in all layers are refused.
"""

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

FAMILIES: dict[str, str] = {
    "arcee": "",
    "cohere": "pairs are interleaved",
    "deepseek_v2": "latent attention; served in DeepSeek's own YaRN keys",
    "deepseek_v3": "as deepseek_v2",
    "ernie4_5": "pairs are interleaved",
    "exaone4": "releases without a sliding window (1.2B)",
    "falcon": "releases with RoPE, not ALiBi",
    "gemma": "",
    "gemma2": "sliding layers share the table",
    "gemma3_text": "only full-attention layers are tuned",
    "glm": "pairs are interleaved, half of each head is rotated",
    "glm4": "as glm",
    "gpt_neox": "a quarter of each head is rotated",
    "gpt_oss": "continues its own YaRN; sliding layers share the table",
    "granite": "",
    "granitemoe": "",
    "llama": "",
    "ministral": "sliding layers share the table",
    "mistral": "releases without a sliding window (v0.2 and later)",
    "mixtral": "",
    "nemotron": "half of each head is rotated",
    "olmo": "temperatures only in releases without clip_qkv",
    "olmo2": "",
    "olmo3": "only full-attention layers are tuned",
    "persimmon": "half of each head is rotated",
    "phi": "half of each head is rotated",
    "phi3": "Phi-3, Phi-3.5 and Phi-4, up to their sliding window; served as longrope, as the config class wants",
    "qwen2": "sliding layers, if there are any, share the table",
    "qwen2_moe": "",
    "qwen3": "as qwen2",
    "qwen3_moe": "",
    "qwen3_next": "only full-attention layers have positions",
    "seed_oss": "",
    "smollm3": "every fourth layer has no positions",
    "stablelm": "a quarter of each head is rotated",
    "starcoder2": "releases without a sliding window",
}
"""Model type -> a note. Every entry is tested: attach, identity, gradient, export, reload."""


REFUSED: dict[str, str] = {
    "bloom": "its positions are ALiBi, not RoPE",
    "codegen": "it rotates inside its attention, from a table of its own, and no config key scales that",
    "cohere2": "its full-attention layers have no positions, and no change of RoPE extends a sliding window",
    "gemma3": "it is multimodal; take its language model out of the checkpoint (model type gemma3_text)",
    "gpt2": "its positions are learned, not RoPE",
    "gptj": "it rotates inside its attention, from a table of its own, and no config key scales that",
    "hunyuan_v1_dense": "it normalises queries after rotating them, which undoes a temperature",
    "mpt": "its positions are ALiBi, not RoPE",
    "opt": "its positions are learned, not RoPE",
    "phimoe": "it computes its table anew in each forward, by a rule of its own",
}
"""Model type -> why it cannot be tuned, where there is more to say than that it is not supported."""

LATENT = frozenset({"deepseek_v2", "deepseek_v3"})
"""Families whose keys and values are compressed together, and only a part of each head is rotated, the last."""

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
"""Of the transformers that is installed."""

SINCE: dict[str, tuple[int, int]] = {"gemma3_text": (5, 19), "olmo3": (5, 19), "qwen3_moe": (5, 4)}
"""Model type -> first release of transformers that was seen to read the rope sections of its exports rightly."""

FULL = "full_attention"
"""The kind of layer that is tuned where a model has several."""

INTERLEAVED = frozenset({"cohere", "cohere2", "ernie4_5", "glm", "glm4", "deepseek_v2", "deepseek_v3", "llama4"})
"""Families whose pairs are neighbours (2i, 2i + 1); elsewhere pair i is (i, i + d/2)."""


@dataclass(frozen=True)
class Layout:
    """What a config says about the shape of its rotary embeddings, with every rope key taken away."""

    model_type: str
    head_dim: int
    kinds: tuple[str, ...]
    """Kinds of layers with tables of their own; `("",)` where all layers share one."""
    thetas: dict[str, float]
    """The family's own theta by kind, which readers fall back to."""
    partial_rotary_factor: float
    """The family's own default."""
    original: int | None = None
    """`original_max_position_embeddings` at the top level of the config (Phi-3 has it there)."""

    @property
    def nested(self) -> bool:
        """Whether the rope section has one part a kind of layer."""
        return self.kinds != ("",)


ROPE_KEYS = ("rope_scaling", "rope_parameters", "rope_theta", "rope_local_base_freq", "partial_rotary_factor",
             "rotary_pct", "rotary_emb_base")  # fmt: skip


def layout_of(config: dict[str, Any]) -> Layout:
    """The layout behind a config.json, from the family's own config class.

    Raises:
        UserError: if the installed transformers does not know the model type, or it has no RoPE.
    """
    kind = config.get("model_type", "")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"config.json: model_type {kind!r} is not one that the installed transformers knows")
    # Without the window too, or a family whose default is YaRN warns that the two do not fit.
    left_out = (*ROPE_KEYS, "max_position_embeddings")
    bare = CONFIG_MAPPING[kind].from_dict({k: v for k, v in config.items() if k not in left_out})
    sections = getattr(bare, "rope_parameters", None)
    if not sections:
        raise UserError(f"config.json: {kind} has no rotary position embeddings (RoPE)")
    by_kind = {"": sections} if "rope_theta" in sections else {k: v for k, v in sections.items() if v}
    first = next(iter(by_kind.values()))
    return Layout(
        model_type=kind,
        head_dim=head_dim_of(bare),
        kinds=tuple(by_kind),
        thetas={k: float(v["rope_theta"]) for k, v in by_kind.items()},
        partial_rotary_factor=float(first.get("partial_rotary_factor", 1.0)),
        original=getattr(bare, "original_max_position_embeddings", None),
    )


def head_dim_of(config: PreTrainedConfig) -> int:
    """Of one head; of its rotated part, where attention is latent."""
    given = getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True, kw_only=True)
class RopeFacts:
    """What a base model's config says about its rotary embeddings."""

    model_type: str
    theta: float
    dim: int
    """Rotary dimensions of one head; d/2 pairs."""
    head_dim: int
    native: int
    """The window the base reads, in tokens: `max_position_embeddings`, or what its YaRN reaches."""
    partial_rotary_factor: float
    layer_kind: str = ""
    """The kind of layers these facts are about; empty where all layers share one table."""
    scaling: Scaling | None = None
    """What its config already does to the frequencies."""
    softmax_gain: float = 1.0
    """What the base multiplies all its logits by on top (DeepSeek's mscale_all_dim)."""
    sees: int | None = None
    """How far back any layer looks at most, in tokens; None for all the way."""

    @property
    def ramp(self) -> Ramp | None:
        """The YaRN it ships, if that is its scaling."""
        return self.scaling.ramp if self.scaling else None

    def table(self, length: int) -> tuple[Tensor, float]:
        """Inverse frequencies `[d/2]` and multiplier of cos and sin of the untouched base, reading `length` tokens."""
        if self.scaling is not None:
            return self.scaling.table(length)
        return default_inv_freq(self.theta, self.dim), 1.0


def rope_facts(config: PreTrainedConfig) -> RopeFacts:
    """Read the rotary layout of a base model.

    Raises:
        UserError: if this model cannot be tuned, with the reason.
    """
    kind = config.model_type
    rope = getattr(config, "rope_parameters", None)
    reason = REFUSED.get(kind) or ("its positions are ALiBi, not RoPE" if getattr(config, "alibi", False) else None)
    if reason is not None:
        raise UserError(f"base.model: {kind} cannot be tuned: {reason}")
    if not rope:
        raise UserError(f"base.model: {kind} has no rotary position embeddings (RoPE), so there is nothing to tune")
    if kind not in FAMILIES:
        raise UserError(f"base.model: model type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    if (since := SINCE.get(kind, (5, 0))) > RELEASE:
        raise UserError(
            f"base.model: {kind} needs transformers {since[0]}.{since[1]} or newer, since older ones read its exports "
            f"wrongly; found {transformers.__version__}"
        )
    layer_kind = "" if "rope_theta" in rope else FULL
    if layer_kind:
        if layer_kind not in config.layer_types:
            raise UserError(f"base.model: this {kind} has no full-attention layer, and only those can be extended")
        rope = rope[layer_kind]
    scaling = scaling_of(config, rope, layer_kind)
    sees = None if layer_kind else _sees(config)
    if kind == "exaone4" and has_sliding_layers(config):
        raise UserError("base.model: full-attention layers of this exaone4 have no positions; its window grows without")
    if sees is not None and sees < config.max_position_embeddings:
        raise UserError(
            f"base.model: layers of this {kind} look back only {sees} tokens (sliding window), which no change of RoPE "
            "extends"
        )
    head_dim = head_dim_of(config)
    partial = rope.get("partial_rotary_factor", 1.0)
    reach = scaling.ramp.reach if scaling and scaling.ramp else 0
    return RopeFacts(
        model_type=kind,
        theta=float(rope["rope_theta"]),
        dim=int(head_dim * partial),
        head_dim=head_dim,
        native=max(config.max_position_embeddings, reach),
        partial_rotary_factor=partial,
        layer_kind=layer_kind,
        scaling=scaling,
        softmax_gain=softmax_gain(kind, dict(rope)),
        sees=sees,
    )


def softmax_gain(kind: str, section: dict[str, Any]) -> float:
    """What latent attention multiplies its logits by, over all dimensions of a head, under a rope section."""
    factor, weight = section.get("factor"), section.get("mscale_all_dim")
    if kind not in LATENT or section.get("rope_type") in (None, "default") or not weight or not factor:
        return 1.0
    return yarn_gain(factor, weight) ** 2


def has_sliding_layers(config: PreTrainedConfig) -> bool:
    """Whether the config names layers that look back through a sliding window."""
    return "sliding_attention" in (getattr(config, "layer_types", None) or ())


def _sees(config: PreTrainedConfig) -> int | None:
    """How far back the layer looks that looks farthest; None for all the way."""
    kinds = getattr(config, "layer_types", None)
    used = getattr(config, "use_sliding_window", True) if kinds is None else FULL not in kinds
    return (getattr(config, "sliding_window", None) or None) if used else None


def logit_transform(config: PreTrainedConfig) -> Callable[[Tensor], Tensor] | None:
    """What the family does to the product of hidden states and vocabulary matrix; None where nothing."""
    if config.model_type == "cohere":
        return lambda logits: logits * config.logit_scale
    if config.model_type in ("granite", "granitemoe"):
        return lambda logits: logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)
    return None if cap is None else lambda logits: torch.tanh(logits / cap) * cap
