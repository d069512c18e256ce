"""The language model inside a multimodal one: where its config, its modules and its weights are.

One row per multimodal model type that can be tuned. Only the language model is trained, on text; the wrapper is loaded,
exported and served as a whole. `families.py` has the rows of the language models themselves.
"""

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import UserError
from .families import FAMILIES, FULL, family_of

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
"""Major and minor version of the installed transformers."""

ROPE_KEYS = {"rope_scaling", "rope_parameters", "rope_theta", "rope_local_base_freq", "partial_rotary_factor",
             "rotary_pct", "rotary_emb_base"}  # fmt: skip
"""Config keys about RoPE, as written by any release; families add their own."""


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """Where one multimodal model type keeps its language model."""

    model_type: str
    texts: tuple[str, ...]
    """Model types of the language models with which it can be tuned."""
    key: str = "text_config"
    """Key of the config of the language model; old checkpoints may have its keys at the top level instead."""
    module: str = "model.language_model"
    """Dotted name of the language model (without the vocabulary matrix) in memory."""
    saved: tuple[str, ...] = ()
    """Prefixes of its weights in checkpoints; transformers renames them to `module` when it loads them."""
    axes: int = 0
    """First dimension of its `position_ids`: 4 where a row of text positions precedes those of time, height and width;
    0 where there is no such dimension."""

    def anchored(self, pattern: str) -> str:
        """A regular expression for names of weights in the language model, in memory or in a checkpoint.

        `pattern` matches their names in the language model alone. Weights of vision towers and of speculative layers
        (`mtp.*`), which may end in the same way, do not match.
        """
        return f"^(?:{'|'.join(re.escape(f'{prefix}.') for prefix in (self.module, *self.saved))}){pattern}"

    def saved_names(self, name: str) -> tuple[str, ...]:
        """The names that a weight of the language model, named as in memory, can have in a checkpoint."""
        tail = name.removeprefix(self.module)
        return (name, *(prefix + tail for prefix in self.saved if tail != name))


LLAVA = ("language_model.model",)
"""Prefix in checkpoints of wrappers that follow LLaVA."""

WRAPPERS: dict[str, Wrapper] = {
    row.model_type: row
    for row in (
        Wrapper(model_type="gemma3", texts=("gemma3_text",), saved=LLAVA),
        Wrapper(model_type="gemma4", texts=("gemma4_text",)),
        Wrapper(model_type="gemma4_unified", texts=("gemma4_unified_text",)),
        Wrapper(model_type="kimi_k25", texts=("deepseek_v3",), saved=LLAVA),
        Wrapper(model_type="mistral3", texts=("ministral3", "mistral", "mistral4"), saved=LLAVA),
        Wrapper(model_type="qwen2_vl", texts=("qwen2_vl_text",), saved=("model",), axes=4),
        Wrapper(model_type="qwen2_5_vl", texts=("qwen2_5_vl_text",), saved=("model",), axes=4),
        Wrapper(model_type="qwen3_5", texts=("qwen3_5_text",), axes=4),
        Wrapper(model_type="qwen3_5_moe", texts=("qwen3_5_moe_text",), axes=4),
        Wrapper(model_type="qwen3_vl", texts=("qwen3_vl_text",), axes=4),
        Wrapper(model_type="qwen3_vl_moe", texts=("qwen3_vl_moe_text",), axes=4),
    )
}


def wrapper_of(config: PreTrainedConfig) -> Wrapper | None:
    """The row of a config's model type; None if it is no wrapper that can be tuned."""
    return WRAPPERS.get(config.model_type)


def needs_own_auto_class(model_type: str) -> bool:
    """Whether AutoModelForCausalLM does not load a wrapper, and AutoModelForImageTextToText must."""
    return model_type in WRAPPERS and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def inside_wrapper(module: str) -> bool:
    """Whether a module, by its dotted name, is part of the language model in a wrapper."""
    return any(module.startswith(f"{row.module}.") for row in WRAPPERS.values())


# Whether a model can be tuned.


def refusal(config: PreTrainedConfig) -> str | None:
    """The reason why no model with this config can be tuned; None if no reason is known."""
    family = family_of(config.model_type)
    if config.model_type in FAMILIES and family.refused:
        return family.refused
    text = config.get_text_config()
    if text is not config:
        row = wrapper_of(config)
        if row is None or text.model_type not in row.texts:
            return _of_language_model(text.model_type)
        config, family = text, family_of(text.model_type)
    elif not family.alone:
        return "transformers has no class for this language model alone; tune the multimodal checkpoint that it is in"
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


def _of_language_model(model_type: str) -> str:
    """The reason why a multimodal model cannot be tuned as a whole, from what is known of its language model."""
    if model_type not in FAMILIES or not FAMILIES[model_type].alone:
        return f"it is multimodal, and transformers has no class for its language model (model type {model_type}) alone"
    if reason := FAMILIES[model_type].refused:
        return f"it is multimodal, and its language model (model type {model_type}) cannot be tuned: {reason}"
    return f"it is multimodal; extract its language model (model type {model_type}) from the checkpoint"


# The config of the language model.


def text_section(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of the language model in a config.json: its nested text config where it wraps one, else all of it.

    Old checkpoints of some wrapped families have these keys at the top level; then those are returned, under the model
    type of the text model.
    """
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        nested = config.get("text_config")
        return nested if isinstance(nested, dict) else config
    whole = bare_config(config)
    text = whole.get_text_config(decoder=True)
    if text is whole or whole.is_encoder_decoder:
        return config
    key = _key_of_text(config, whole, text)
    found = config[key] if key else {key: value for key, value in config.items() if key not in whole.sub_configs}
    return found | {"model_type": text.model_type}


def with_text_section(config: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """The config.json with other keys of its language model, where `text_section` found them."""
    if text_section(config) is config:
        return text
    whole = bare_config(config)
    key = _key_of_text(config, whole, whole.get_text_config(decoder=True))
    if key:  # with its own model type, which `text_section` may have translated, or without one
        own = {"model_type": config[key].get("model_type")}
        return config | {key: {k: v for k, v in (text | own).items() if k != "model_type" or v is not None}}
    kept = {k: v for k, v in config.items() if k in (*whole.sub_configs, "model_type")}
    return text | kept


def with_nested_text(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a wrapper with the keys of its language model under its `key`, as config objects have them.

    Old checkpoints have them at the top level; other configs are returned unchanged.
    """
    row = WRAPPERS.get(config.get("model_type", ""))
    if row is None or isinstance(config.get(row.key), dict):
        return config
    kept = {k: v for k, v in config.items() if k in (*bare_config(config).sub_configs, "model_type")}
    return kept | {row.key: text_section(config)}


def _key_of_text(config: dict[str, Any], whole: PreTrainedConfig, text: PreTrainedConfig) -> str | None:
    """The key of the nested config of the language model; None if its keys are at the top level."""
    return next((k for k, v in config.items() if isinstance(v, dict) and getattr(whole, k, None) is text), None)


def bare_config(config: dict[str, Any]) -> PreTrainedConfig:
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
    computed = {key for key in config if isinstance(getattr(kind, key, None), property)} - {"per_layer_config"}
    kept = {key: value for key, value in config.items() if key not in computed}
    # Infinities (Mamba's time steps) are objects in a file; transformers decodes them when it reads one.
    decode = getattr(kind, "_decode_special_floats", dict)
    return kind.from_dict(decode(copy.deepcopy(kept)))  # config classes write into the rope section they are given


# The modules of the language model.


def auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """The class that loads a model: the wrapper as a whole, or a language model."""
    return AutoModelForImageTextToText if wrapper_of(config) else AutoModelForCausalLM


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device, which has no data."""
    with torch.device("meta"):
        return auto_class(config).from_config(config)  # type: ignore[no-any-return, no-untyped-call]


def language_tower(model: PreTrainedModel) -> nn.Module:
    """The language model in a wrapper (without the vocabulary matrix); other models themselves."""
    row = wrapper_of(model.config)
    return model.get_submodule(row.module) if row else model


def rotary_site(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The parent module and the attribute name of the one rotary module below the language model."""
    sites = [
        (parent, name)
        for parent in language_tower(model).modules()
        for name, child in parent.named_children()
        if type(child).__name__.endswith("RotaryEmbedding")
        and (hasattr(child, "inv_freq") or hasattr(child, f"{FULL}_inv_freq"))
    ]
    if len(sites) != 1:
        raise UserError(f"base.model: expected one shared rotary module in the model, found {len(sites)}")
    return sites[0]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the language model, found by the class names in `_no_split_modules`."""
    tower = language_tower(model)
    names = getattr(tower, "_no_split_modules", None) or ()
    return [module for module in tower.modules() if type(module).__name__ in names]


def switch_off_dropout(model: PreTrainedModel) -> None:
    """Set dropout to 0: frozen weights need none, and training mode (which checkpointing needs) would enable it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # Some families pass a probability of the module, or the config's, to a function.
    for owner in (model.config, model.config.get_text_config(), *model.modules()):
        for name, value in vars(owner).items():
            if "drop" in name and isinstance(value, float):
                setattr(owner, name, 0.0)
