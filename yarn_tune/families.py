"""What we know about Hugging Face model classes, in one table; what is not in it is refused with the reason.

All families here share one layout: a single `*RotaryEmbedding` module below the base model computes cos and sin
for every layer from one `inv_freq` buffer. Families whose layers have tables of their own, or whose layers look
back only through a sliding window, need more than that and are refused for now.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .errors import UserError

FAMILIES: dict[str, str] = {
    "cohere": "pairs are interleaved",
    "gemma": "",
    "gpt_neox": "a quarter of each head is rotated",
    "granite": "",
    "llama": "",
    "mistral": "releases without a sliding window (v0.2 and later)",
    "mixtral": "",
    "olmo2": "",
    "phi": "half of each head is rotated",
    "qwen2": "",
    "qwen3": "",
    "smollm3": "every fourth layer has no positions",
    "stablelm": "a quarter of each head is rotated",
    "starcoder2": "releases without a sliding window",
}
"""Model type -> a note. Every entry is tested: attach, identity, gradient, export, reload."""


@dataclass(frozen=True, kw_only=True)
class RopeFacts:
    """What a base model's config says about its rotary embeddings."""

    model_type: str
    theta: float
    dim: int
    """Rotary dimensions of one head; d/2 pairs."""
    head_dim: int
    native: int
    """`max_position_embeddings`, in tokens."""
    partial_rotary_factor: float


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
    if "rope_theta" not in rope:
        raise UserError(f"base.model: this {kind} has one rotary table per layer type, which is not supported yet")
    if rope["rope_type"] != "default":
        raise UserError(
            f"base.model: its config already carries rope_type {rope['rope_type']!r}; "
            "continuing from an extended model is not supported yet, use the model it was made from"
        )
    if _sliding_window(config):
        raise UserError(
            f"base.model: layers of this {kind} look back only {config.sliding_window} tokens (sliding window), "
            "which no change of RoPE extends"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    partial = rope.get("partial_rotary_factor", 1.0)
    return RopeFacts(
        model_type=kind,
        theta=float(rope["rope_theta"]),
        dim=int(head_dim * partial),
        head_dim=head_dim,
        native=config.max_position_embeddings,
        partial_rotary_factor=partial,
    )


def _sliding_window(config: PreTrainedConfig) -> bool:
    """Whether any layer attends through a sliding window."""
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
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
    loaded = _from_hub(AutoModelForCausalLM.from_pretrained, model, revision=revision, dtype=getattr(torch, dtype))
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
        return load(model, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"base.model: {model!r} could not be loaded: {reason}") from error


def rotary_site(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The parent module and the attribute name of the one rotary module all layers share."""
    sites = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__.endswith("RotaryEmbedding") and hasattr(child, "inv_freq")
    ]
    if len(sites) != 1:
        raise UserError(f"base.model: expected one shared rotary module in the model, found {len(sites)}")
    return sites[0]


def switch_off_dropout(model: PreTrainedModel) -> None:
    """Frozen weights need no dropout, and training mode (which checkpointing needs) would switch it on."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
