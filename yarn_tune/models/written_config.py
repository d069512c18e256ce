"""A config.json as people have it: wrapped, incomplete, or of a model type that transformers lacks."""

import copy
import json
from functools import lru_cache
from typing import Any

from transformers import CONFIG_MAPPING

from ..errors import UserError
from .rope_config import Layout, layout_of, text_section

ALIASES = {"kimi_k2": "deepseek_v3"}
"""Model types that transformers does not have, and the type whose keys and computation they share."""


def resembling(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose model type transformers lacks, in the keys of a type that it has; others as they are.

    Code that such a checkpoint brings is not read: without an entry in `ALIASES` its keys are taken to mean what they
    mean in a Llama-type model.
    """
    kind = config.get("model_type", "")
    if kind in CONFIG_MAPPING or isinstance(config.get("text_config"), dict):
        return config
    if kind in ALIASES:
        return config | {"model_type": ALIASES[kind]}
    if not isinstance(config.get("hidden_size"), int) or not isinstance(config.get("num_attention_heads"), int):
        return config
    renamed = {"kv_channels": "head_dim", "rotary_emb_base": "rope_theta", "num_layers": "num_hidden_layers"}
    made = {renamed[key]: config[key] for key in renamed if key in config}
    if kind == "chatglm":
        made |= {
            "rope_theta": 1e4 * config.get("rope_ratio", 1),
            "partial_rotary_factor": 0.5,
            "rope_parameters": {
                "rope_type": "default",
                "partial_rotary_factor": 0.5,
                "rope_theta": 1e4 * config.get("rope_ratio", 1),
            },
        }
    if "seq_length" in config:
        made["max_position_embeddings"] = config.get("max_position_embeddings", config["seq_length"])
    return {"head_dim": None} | made | config | {"model_type": "llama"} | made


def is_foreign(config: dict[str, Any]) -> bool:
    """Whether transformers lacks the model type, also that of the language model in a wrapper."""
    text = config.get("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None
    return config.get("model_type", "") not in CONFIG_MAPPING or (inner is not None and inner not in CONFIG_MAPPING)


def language_model(config: dict[str, Any]) -> tuple[dict[str, Any], Layout]:
    """The keys of the language model in a config.json, with its window filled in, and the layout behind them.

    Raises:
        UserError: if it has no RoPE, or its config class does not take the other keys.
    """
    text, layout = _language_model(json.dumps(config, default=str))
    return copy.deepcopy(text), layout


@lru_cache(maxsize=64)
def _language_model(content: str) -> tuple[dict[str, Any], Layout]:
    config = json.loads(content)
    try:
        text = resembling(text_section(resembling(config)))
        layout = layout_of(text)
        text = {"max_position_embeddings": default_window(layout.model_type)} | text
    except UserError:
        raise
    except Exception as error:  # a damaged config makes config classes raise anything
        raise UserError(f"config.json: {config.get('model_type')} cannot be loaded: {condensed(error)}") from error
    return text | {"model_type": layout.model_type}, layout


def default_window(model_type: str) -> int:
    """max_position_embeddings of the config class, for configs that leave it out."""
    return int(getattr(CONFIG_MAPPING[model_type](), "max_position_embeddings", 2048))


def condensed(error: BaseException) -> str:
    """An exception's whole text on one line."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__
