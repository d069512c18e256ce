"""Handle any config.json: wrapped, incomplete, with wrong types or misspelt keys, or of an unknown model type."""

import copy
import difflib
import json
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..errors import UserError
from .families import family_of
from .rope_config import Layout, layout_of
from .wrappers import ROPE_KEYS, text_section

ALIASES = {"kimi_k2": "deepseek_v3"}
"""Model types that transformers does not have, and the type whose keys and computation they share."""


def resembling(config: dict[str, Any]) -> dict[str, Any]:
    """Translate a config of a model type that transformers lacks to a type that it has; return others unchanged.

    The checkpoint's own code is not read: without an entry in `ALIASES`, its keys are interpreted as those of a
    Llama-type model.
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
    known = {None, *CONFIG_MAPPING, *ALIASES}  # the config class of a wrapper translates an alias itself
    return config.get("model_type", "") not in CONFIG_MAPPING or inner not in known


def language_model(config: dict[str, Any]) -> tuple[dict[str, Any], Layout]:
    """The keys of the language model in a config.json, with its window filled in, and their layout.

    Raises:
        UserError: if it has no RoPE, or its config class rejects other keys.
    """
    text, layout = _language_model(json.dumps(config, default=str))
    return copy.deepcopy(text), layout


@lru_cache(maxsize=64)
def _language_model(content: str) -> tuple[dict[str, Any], Layout]:
    config = json.loads(content)
    try:
        text = resembling(text_section(resembling(config)))
        layout = layout_of(text)
        renamed = CONFIG_MAPPING[layout.model_type].attribute_map.get("max_position_embeddings", "")
        window = text.get(renamed) or default_window(layout.model_type)
        text = {"max_position_embeddings": window} | text
    except UserError:
        raise
    except Exception as error:  # a damaged config makes config classes raise anything
        raise UserError(f"config.json: {config.get('model_type')} cannot be loaded: {condensed(error)}") from error
    return text | {"model_type": layout.model_type}, layout


def default_window(model_type: str) -> int:
    """max_position_embeddings of the config class, for configs that omit it."""
    return int(getattr(CONFIG_MAPPING[model_type](), "max_position_embeddings", 2048))


def condensed(error: BaseException) -> str:
    """An exception's whole text on one line."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


SECTIONS = ("rope_scaling", "rope_parameters")
NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys under which wrappers keep the config of their language model."""
WHOLE = ("max_position_embeddings", "hidden_size", "num_attention_heads", "num_hidden_layers", "head_dim",
         "original_max_position_embeddings", "qk_rope_head_dim", "sliding_window", "n_positions", "max_seq_len",
         "seq_length", "model_max_length", "max_sequence_length", "max_seq_length", "seq_len")  # fmt: skip
REQUIRED = ("max_position_embeddings", "hidden_size", "num_attention_heads", "num_hidden_layers")
"""Keys that may be left out, where the config class has a default, but must not be null."""
NUMBERS = ("rope_theta", "rotary_emb_base", "rope_local_base_freq", "partial_rotary_factor", "rotary_pct")
IN_SECTION = ("factor", "original_max_position_embeddings", "attention_factor", "attn_factor", "beta_fast",
              "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor", "rope_theta",
              "partial_rotary_factor", "short_mscale", "long_mscale", "alpha", "extrapolation_factor",
              "llama_4_scaling_beta", "max_trained_positions")  # fmt: skip
"""Keys of a rope section that hold numbers."""
POSITIVE = {"factor", "rope_theta", "rotary_emb_base", "original_max_position_embeddings", "max_position_embeddings",
            "hidden_size", "num_attention_heads", "alpha"}  # fmt: skip
OTHER_IN_SECTION = ("rope_type", "type", "short_factor", "long_factor", "truncate", "mrope_section",
                    "mrope_interleaved", "apply_yarn_scaling", "finetuned", "dynamic", "rope_dim")  # fmt: skip
SCALED_TYPES = {"yarn", "linear", "dynamic", "longrope", "su", "llama3", "ntk", "deepseek_yarn"}


def check_types(config: dict[str, Any]) -> None:
    """Refuse values of the wrong type under the keys that the rotary embeddings are computed from.

    Raises:
        UserError: naming every such key, its value and what to write.
    """
    faults = list(_faults(config, ""))
    if faults:
        raise UserError("config.json: " + "; ".join(faults))


def check_loadable(config: dict[str, Any]) -> None:
    """Raise `UserError` with the remedy if a config that transformers does not load is of a known kind."""
    kind = config.get("model_type", "")
    if kind in ALIASES and kind not in CONFIG_MAPPING:
        raise UserError(
            f"base.model: transformers has no model type {kind!r}, which is a {ALIASES[kind]} under another name: in a "
            f'copy of its config.json write "model_type": "{ALIASES[kind]}", and remove auto_map'
        )
    check_types(config)
    for key in SECTIONS:
        section = config.get(key)
        if not isinstance(section, dict):
            continue
        if isinstance(config.get("text_config"), dict):
            raise UserError(
                f"config.json: {key} is at the top level of a {kind} config, whose language model is configured in "
                "text_config; write it there"
            )
        if section.get("rope_type", section.get("type")) == "su" and family_of(kind).longrope_only:
            raise UserError(
                f"config.json: {key} has type 'su', by which transformers 5 does not find the original length at the "
                'top level of the config; in a copy of it write "longrope"'
            )


def check_rope_types(config: PreTrainedConfig) -> None:
    """`check_types` for a loaded config: config classes accept strings for most numbers, and fail later."""
    written = config.to_dict()
    keys = (*SECTIONS, *NUMBERS, "max_position_embeddings")
    check_types({key: written[key] for key in keys if written.get(key) is not None})


def _faults(config: dict[str, Any], path: str) -> Iterator[str]:
    for key in (*WHOLE, *NUMBERS):
        if key in config:
            yield from _number_faults(path + key, config[key], whole=key in WHOLE, null=key not in REQUIRED)
    inside = [config.get(key) for key in SECTIONS]
    written = any(isinstance(section, dict) and "rope_theta" in str(section) for section in inside)
    if "rope_theta" in config and config["rope_theta"] is None and not written:
        yield f"{path}rope_theta is null, where a number is needed"
    for key in SECTIONS:
        section = config.get(key)
        if section is not None and section is not False and not isinstance(section, dict):
            yield f'{path}{key} is {_shown(section)}, where an object is needed; write it as {{"rope_type": ..., ...}}'
        elif isinstance(section, dict):
            yield from _section_faults(f"{path}{key}.", section)
    for key in NESTED:
        if isinstance(config.get(key), dict):
            yield from _faults(config[key], f"{path}{key}.")


def _section_faults(path: str, section: dict[str, Any]) -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _section_faults(f"{path}{key}.", value)
        elif key in IN_SECTION:
            yield from _number_faults(path + key, value, whole=False, null=True)
        elif key in ("rope_type", "type") and not isinstance(value, str | None):
            yield f'{path}{key} is {_shown(value)}, where a name is needed, such as "yarn"'
        elif key in ("short_factor", "long_factor"):
            wrong = not isinstance(value, list) or any(
                isinstance(v, bool) or not isinstance(v, int | float) for v in value
            )
            if wrong:
                yield f"{path}{key} is {_shown(value)}, where a list of numbers is needed, one per pair"
        elif key == "truncate" and not isinstance(value, bool | None):
            yield f"{path}{key} is {_shown(value)}; write true or false without quotes"


def _number_faults(path: str, value: Any, whole: bool, null: bool) -> Iterator[str]:
    needed = "a whole number" if whole else "a number"
    if value is None:
        if not null:
            yield f"{path} is null, where {needed} is needed"
        return
    if isinstance(value, str):
        yield f"{path} is {_shown(value)}, a string, where {needed} is needed{_unquoted(value, whole)}"
    elif isinstance(value, bool) or not isinstance(value, int | float):
        yield f"{path} is {_shown(value)}, where {needed} is needed"
    elif not math.isfinite(value):
        yield f"{path} is {value}, where {needed} is needed"
    elif whole and isinstance(value, float) and not path.endswith("original_max_position_embeddings"):
        hint = f"; write {int(value)}" if value == int(value) else ""
        yield f"{path} is {value}, where a whole number is needed: transformers 5 does not load it{hint}"
    elif value <= 0 and path.rsplit(".", 1)[-1] in POSITIVE:
        yield f"{path} is {value}, where a number above 0 is needed"


def _unquoted(value: str, whole: bool) -> str:
    try:
        number = float(value)
    except ValueError:
        return ""
    return f"; write {int(number) if whole and number == int(number) else value.strip()} without quotes"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def spelling_mistakes(config: dict[str, Any], text: dict[str, Any]) -> list[str]:
    """Messages about keys of a config.json and its language model that look like rope keys and that no stack reads."""
    found = {**dict(_misspelt(config)), **dict(_misspelt(text))}
    messages = [
        f"{key!r} is a key that no stack reads, so what it holds is ignored; {meant!r} may be meant"
        for key, meant in found.items()
    ]
    for name in SECTIONS:
        section = text.get(name) or {}
        for part in (section, *(value for value in section.values() if isinstance(value, dict))):
            messages += [
                f"{key!r} in {name} is a key that no stack reads, so it is ignored; {meant!r} may be meant"
                for key, meant in _misspelt_in_section(part)
            ]
    return messages


def _misspelt(config: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, the key that may be meant) of keys that look like rope keys and that no stack reads."""
    found = []
    known = [*SECTIONS, "rope_theta", "max_position_embeddings", "original_max_position_embeddings"]
    for key, value in config.items():
        if key in ROPE_KEYS or key in WHOLE:
            continue
        close = _closest(key, known)
        kind = value.get("rope_type", value.get("type")) if isinstance(value, dict) else None
        scaled = isinstance(kind, str) and kind.lower() in SCALED_TYPES
        if close in SECTIONS and not isinstance(value, dict | list | str):
            continue
        if close is not None or scaled:
            found.append((key, close or "rope_scaling"))
    return found


def _misspelt_in_section(section: dict[str, Any]) -> list[tuple[str, str]]:
    """`_misspelt` for the keys of a rope section."""
    known = [*IN_SECTION, *OTHER_IN_SECTION]
    pairs = [(key, _closest(key, known)) for key in section if key not in known]
    return [(key, close) for key, close in pairs if close is not None]


def _closest(key: str, known: list[str]) -> str | None:
    """The known key of which this is another spelling."""

    def plain(name: str) -> str:
        return name.lower().replace("_", "").replace("-", "").replace(" ", "")

    names = {plain(name): name for name in known}
    match = difflib.get_close_matches(plain(key), list(names), n=1, cutoff=0.88)
    return names[match[0]] if match else None
