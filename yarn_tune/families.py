"""What we know about Hugging Face model classes, in one table; what is not in it is refused with the reason.

In all families here a single `*RotaryEmbedding` module below the base model computes cos and sin for every layer.
Most compute them from one `inv_freq` buffer. Where layers differ by kind (Gemma 3, OLMo 3), the module holds one
table a kind, and only that of the full-attention layers is tuned: the others look back through a sliding window,
which no change of RoPE extends. Models whose every layer does so are refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .base_scaling import Scaling, scaling_of
from .errors import UserError
from .rope import default_inv_freq

FAMILIES: dict[str, str] = {
    "cohere": "pairs are interleaved",
    "gemma": "",
    "gemma3_text": "only full-attention layers are tuned",
    "gpt_neox": "a quarter of each head is rotated",
    "granite": "",
    "llama": "",
    "mistral": "releases without a sliding window (v0.2 and later)",
    "mixtral": "",
    "olmo2": "",
    "olmo3": "only full-attention layers are tuned",
    "phi": "half of each head is rotated",
    "phi3": "releases without a sliding window; served as longrope, as its config class wants",
    "qwen2": "",
    "qwen3": "",
    "smollm3": "every fourth layer has no positions",
    "stablelm": "a quarter of each head is rotated",
    "starcoder2": "releases without a sliding window",
}
"""Model type -> a note. Every entry is tested: attach, identity, gradient, export, reload."""


FULL = "full_attention"
"""The kind of layer that is tuned where a model has several."""

INTERLEAVED = frozenset({"cohere", "cohere2", "glm", "glm4", "deepseek_v2", "deepseek_v3", "llama4"})
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
    bare = CONFIG_MAPPING[kind].from_dict({k: v for k, v in config.items() if k not in ROPE_KEYS})
    sections = getattr(bare, "rope_parameters", None)
    if not sections:
        raise UserError(f"config.json: {kind} has no rotary position embeddings (RoPE)")
    by_kind = {"": sections} if "rope_theta" in sections else {k: v for k, v in sections.items() if v}
    head_dim = getattr(bare, "head_dim", None) or bare.hidden_size // bare.num_attention_heads
    first = next(iter(by_kind.values()))
    return Layout(
        model_type=kind,
        head_dim=getattr(bare, "qk_rope_head_dim", None) or head_dim,
        kinds=tuple(by_kind),
        thetas={k: float(v["rope_theta"]) for k, v in by_kind.items()},
        partial_rotary_factor=float(first.get("partial_rotary_factor", 1.0)),
        original=getattr(bare, "original_max_position_embeddings", None),
    )


def config_json(model: str, revision: str | None = None) -> dict[str, Any]:
    """A checkpoint's config.json as written, from a folder or hub id.

    Raises:
        UserError: if there is no such model.
    """
    load_config(model, revision)
    written = _from_hub(PreTrainedConfig.get_config_dict, model, revision=revision)[0]
    return {key: value for key, value in written.items() if key != "_commit_hash"}


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
    if not rope:
        raise UserError(f"base.model: {kind} has no rotary position embeddings (RoPE), so there is nothing to tune")
    if kind not in FAMILIES:
        raise UserError(f"base.model: model type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    layer_kind = "" if "rope_theta" in rope else FULL
    if layer_kind:
        if layer_kind not in config.layer_types:
            raise UserError(f"base.model: this {kind} has no full-attention layer, and only those can be extended")
        rope = rope[layer_kind]
    scaling = scaling_of(config, rope, layer_kind)
    if not layer_kind and _sliding_window(config):
        raise UserError(
            f"base.model: layers of this {kind} look back only {config.sliding_window} tokens (sliding window), "
            "which no change of RoPE extends"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    partial = rope.get("partial_rotary_factor", 1.0)
    reach = scaling.ramp if scaling else None
    return RopeFacts(
        model_type=kind,
        theta=float(rope["rope_theta"]),
        dim=int(head_dim * partial),
        head_dim=head_dim,
        native=max(config.max_position_embeddings, round(reach.factor * reach.original) if reach else 0),
        partial_rotary_factor=partial,
        layer_kind=layer_kind,
        scaling=scaling,
    )


def has_sliding_layers(config: PreTrainedConfig) -> bool:
    """Whether the config names layers that look back through a sliding window."""
    return "sliding_attention" in (getattr(config, "layer_types", None) or ())


def _sliding_window(config: PreTrainedConfig) -> bool:
    """Whether any layer attends through a sliding window."""
    if has_sliding_layers(config):
        return True
    used = getattr(config, "use_sliding_window", True)
    return bool(used and getattr(config, "sliding_window", None))


def logit_transform(config: PreTrainedConfig) -> Callable[[Tensor], Tensor] | None:
    """What the family does to the product of hidden states and vocabulary matrix; None where nothing."""
    if config.model_type == "cohere":
        return lambda logits: logits * config.logit_scale
    if config.model_type == "granite":
        return lambda logits: logits / config.logits_scaling
    return None


def is_hub_id(model: str) -> bool:
    """`org/name`, unless `org` is a folder here: then it is a path, and perhaps a mistyped one."""
    path = Path(model)
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not path.parent.is_dir()


def load_config(model: str, revision: str | None = None, local_only: bool = False) -> PreTrainedConfig:
    """The config of a checkpoint folder or hub id.

    Raises:
        UserError: if there is no such model.
    """
    if not is_hub_id(model) and not (Path(model) / "config.json").is_file():
        raise UserError(f"base.model: {model!r} is neither a checkpoint folder (with config.json) nor a hub id")
    return _from_hub(AutoConfig.from_pretrained, model, revision=revision, local_files_only=local_only)  # type: ignore[no-any-return]


def load_model(model: str, revision: str | None = None, dtype: str = "bfloat16") -> PreTrainedModel:
    """The causal language model with stock classes, in evaluation mode, without a KV cache.

    Its `inv_freq` stays float32: `from_pretrained(dtype=...)` leaves it alone, a later `.to(dtype)` would not.
    """
    loaded = _from_hub(
        AutoModelForCausalLM.from_pretrained,
        model,
        revision=revision,
        dtype=getattr(torch, dtype),
        use_safetensors=True,  # a pickle can hold code
    )
    loaded.config.use_cache = False
    return loaded.eval()  # type: ignore[no-any-return]


def to_device(model: PreTrainedModel) -> PreTrainedModel:
    """The model on the accelerator, if there is one."""
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    return model


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model."""
    return _from_hub(AutoTokenizer.from_pretrained, model, revision=revision)  # type: ignore[no-any-return]


def _from_hub(load: Callable[..., Any], model: str, **options: Any) -> Any:
    """Call a `from_pretrained`; a model that cannot be had is the user's error, not a traceback."""
    try:
        # A checkpoint's own code is never run, and never asked about: what is exported must run on stock classes.
        return load(model, trust_remote_code=False, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged config makes config classes divide by zero, index None, and worse
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it brings code of its own, which is never run here; only model classes of transformers are tuned"
        raise UserError(f"base.model: {model!r} could not be loaded: {reason}") from error


def rotary_site(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The parent module and the attribute name of the one rotary module below the base model."""
    sites = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__.endswith("RotaryEmbedding")
        and (hasattr(child, "inv_freq") or hasattr(child, f"{FULL}_inv_freq"))
    ]
    if len(sites) != 1:
        raise UserError(f"base.model: expected one shared rotary module in the model, found {len(sites)}")
    return sites[0]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's layers, by the class that transformers never splits."""
    return [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]


def switch_off_dropout(model: PreTrainedModel) -> None:
    """Frozen weights need no dropout, and training mode (which checkpointing needs) would switch it on."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
