"""Rules that differ between stacks: where a section is read, which window is used, how many positions are stored.

Sections are those of the language model; O is original_max_position_embeddings, M max_position_embeddings.
"""

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from transformers import CONFIG_MAPPING

from ..models import FULL, ROPE_KEYS, Layout, condensed, family_of, language_model
from .tables import ORIGINAL, NotEstablished, Refused, Section, View

# Where the section and theta come from.


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of transformers' config classes; `advice.py` reports the same problems."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_error(config: Section) -> str | None:
    """Why the config class of transformers 5 rejects this config.json; None if it loads."""
    kind = config.get("model_type", "")
    if kind not in CONFIG_MAPPING:
        return f"the installed transformers has no model type {kind!r}"
    try:
        with quiet():
            CONFIG_MAPPING[kind].from_dict(copy.deepcopy(config))
    except Exception as error:  # config classes raise anything on a damaged config
        return condensed(error)
    return None


def beside(config: Section, layout: Layout) -> float | None:
    """Theta at the top level, under the family's name for it."""
    return config.get(layout.family.theta_key, config.get("rope_theta"))


def v5_sections(config: Section, layout: Layout) -> dict[str, Section]:
    """The sections as transformers 5 reads them, with its own config class.

    rope_scaling replaces rope_parameters; theta is read from the section, else from beside it, else it is the family's
    default; O at the top level replaces O in the section, and M is the default for both.

    Raises:
        Refused: if the config class rejects it.
    """
    _check_legacy_type(config, layout)
    try:
        with quiet():
            made = CONFIG_MAPPING[layout.model_type].from_dict(copy.deepcopy(config))
            # Rotary modules call this again; by then the config has O at the top level if the file has it there.
            made.standardize_rope_params()
            loaded = made.rope_parameters
    except Exception as error:  # config classes raise anything on a damaged config
        raise Refused(condensed(error)) from error
    if not layout.nested:
        if "rope_type" not in loaded:
            raise Refused("its rope section has one part per kind of layer, and all layers of this model share one")
        return {"": dict(loaded)}
    return {kind: dict(loaded[kind]) for kind in layout.kinds if loaded.get(kind)}


def _check_legacy_type(config: Section, layout: Layout) -> None:
    """Refuse "su" for Phi-3 if O is not in the section: its config class sets O before it renames "su"."""
    section = config.get("rope_scaling") or config.get("rope_parameters") or {}
    name = section.get("rope_type", section.get("type"))
    if name == "su" and layout.family.longrope_only and ORIGINAL not in section:
        raise Refused(
            "it does not recognise type 'su' when it reads original_max_position_embeddings at the top level of the "
            "config; write 'longrope'"
        )


def vllm_sections(config: Section, layout: Layout) -> dict[str, Section]:
    """As `v5_sections`, but `rope_type` and `type` may not differ, and `su` is read as longrope."""
    sections = v5_sections(config, layout)
    for section in sections.values():
        _patch_legacy_type(section)
    return sections


def _patch_legacy_type(section: Section) -> None:
    if "rope_type" in section and "type" in section:
        names = (section["type"], section["rope_type"])
        if names[0] != names[1] and names not in (("su", "longrope"), ("mrope", "default")):
            raise Refused(f"rope_type is {names[1]!r} and type is {names[0]!r}; it refuses two different names")
    section.setdefault("rope_type", section.get("type", "default"))
    if section["rope_type"] == "su":
        section["rope_type"] = "longrope"


def lmdeploy_sections(config: Section, layout: Layout) -> dict[str, Section]:
    """As `v5_sections`, but O at the top level is not read, except for Phi-3."""
    if layout.family.longrope_only:
        return v5_sections(config, layout)
    return v5_sections({key: value for key, value in config.items() if key != ORIGINAL}, replace(layout, original=None))


SGLANG_TOP = frozenset(
    {"apertus", "arcee", "exaone4", "exaone_moe", "granite", "hunyuan_v1_dense", "hunyuan_v1_moe", "internlm3",
     "iquestcoder", "llama", "ministral3", "mistral"}
)  # fmt: skip
"""Model types whose model files in SGLang read O at the top level."""


def sglang_sections(config: Section, layout: Layout) -> dict[str, Section]:
    """As `v5_sections`, but O at the top level is read for a few model types only."""
    if layout.model_type in SGLANG_TOP:
        return v5_sections(config, layout)
    return lmdeploy_sections(config, layout)


def v4_sections(config: Section, layout: Layout) -> dict[str, Section]:
    """The sections as transformers 4 reads them: rope_scaling, where `type` replaces `rope_type`, with theta beside."""
    section = dict(config.get("rope_scaling") or {})
    if "type" in section:
        section["rope_type"] = section["type"]
    if section.get("rope_type") == "su" and layout.family.longrope_only:
        section["rope_type"] = "longrope"
    if not layout.nested:
        return {"": section | {"rope_theta": beside(config, layout) or layout.thetas[""]}}
    if FULL not in layout.kinds:
        raise NotEstablished("how it reads the kinds of layers of this model was not established")
    theta = beside(config, layout) or layout.thetas[FULL]
    local = config.get("rope_local_base_freq") or (theta if layout.family.theta_everywhere else None)
    parts = {kind: {"rope_theta": local or layout.thetas[kind]} for kind in layout.kinds}
    return parts | {FULL: section | {"rope_theta": theta}}


def vllm_v4_sections(config: Section, layout: Layout) -> dict[str, Section]:
    """The sections as vLLM on transformers 4 reads them: rope_scaling, else rope_parameters.

    Theta and O beside the section replace those inside. The config class of transformers 4 has a theta even if
    config.json has none, so a theta inside the section is always lost.
    """
    section = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if config.get("rope_scaling") and "type" in section:
        section["rope_type"] = section["type"]
    _patch_legacy_type(section)
    top = {"rope_theta": beside(config, layout) or layout.thetas.get("", 1e4)}
    top |= {ORIGINAL: config[ORIGINAL]} if config.get(ORIGINAL) is not None else {}
    return {"": section | top}


def parameters_first(config: Section, layout: Layout) -> dict[str, Section]:
    """Read rope_parameters, else rope_scaling; theta from the section, else from beside it."""
    section = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    return {"": {"rope_theta": config.get("rope_theta") or layout.thetas.get("", 1e4)} | section}


def scaling_first(config: Section, layout: Layout) -> dict[str, Section]:
    """Read rope_scaling, else rope_parameters; theta from beside the section, else from inside."""
    section = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = config.get("rope_theta") or section.get("rope_theta") or layout.thetas.get("", 1e4)
    return {"": section | {"rope_theta": theta}}


def default_section(base: dict[str, Any], theta: float, kind: str) -> dict[str, Any]:
    """The section of layers that are not tuned, as the base has it."""
    written = (base.get("rope_parameters") or {}).get(kind)
    everywhere = family_of(base["model_type"]).theta_everywhere
    local = base.get("rope_local_base_freq") or (base.get("rope_theta") if everywhere else None)
    return dict(written or {"rope_type": "default", "rope_theta": local or theta})


# The default window.

VLLM_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
             "max_target_positions", "max_sequence_length", "max_seq_length", "seq_len")  # fmt: skip
"""vLLM takes the smallest of these; model_max_length, where it is set, then replaces it."""
SGLANG_KEYS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")
"""SGLang takes the first of these."""
NOT_MULTIPLIED = {"su", "longrope", "llama3", "deepseek_yarn", "deepseek_llama_scaling"}
"""Rope types for which vLLM does not multiply the window by the factor; from 0.30 on also yarn."""


def vllm_length(config: Section) -> int:
    """The window of vLLM before any factor is applied."""
    given = [config[key] for key in VLLM_KEYS if config.get(key) is not None]
    return int(config.get("model_max_length") or min(given))


def vllm_window(views: list[View], multiplied: frozenset[str] = frozenset()) -> int:
    """The window of vLLM: top-level O for longrope; else `vllm_length`, times the factor except in `NOT_MULTIPLIED`."""
    view = views[0]
    length = vllm_length(view.config)
    if any(each.rope_type == "longrope" for each in views) and view.layout.original is not None:
        return int(view.layout.original)
    if "gemma3" in view.layout.model_type:
        return length
    factor: float | None = 1.0
    for each in views:
        if each.rope_type not in NOT_MULTIPLIED | {"yarn"} - multiplied:
            factor = each.section.get("factor", factor)
            if each.rope_type == "yarn":
                length = int(each.original or each.longest)
    return int(length * (1.0 if factor is None else factor))


def old_vllm_window(views: list[View]) -> int:
    """The window of older vLLM: as `vllm_window`, but O times the factor for yarn."""
    return vllm_window(views, frozenset({"yarn"}))


def vllm_rows(view: View) -> int | None:
    """Positions that cos and sin are stored for: ceil(O x s) under yarn, ceil(M x s) under linear, else M."""
    factor = view.section.get("factor")
    if "mrope_section" in view.section:
        return None
    if view.rope_type in ("yarn", "deepseek_yarn", "linear") and factor is not None:
        original = None if view.rope_type == "linear" else view.original
        return int(math.ceil((original or view.longest) * factor))
    if view.rope_type == "longrope":
        return None
    if view.layout.model_type.startswith("cohere"):
        return int(view.config.get("model_max_length") or view.longest)
    return view.longest


def sglang_window(views: list[View]) -> int:
    """The window of SGLang: the first of its keys, times the factor if the section has no O."""
    view = views[0]
    length = next(view.config[key] for key in SGLANG_KEYS if view.config.get(key) is not None)
    unscaled = view.original is not None or view.rope_type in ("llama3", "default")
    return int(length * (1.0 if unscaled else view.section.get("factor") or 1.0))


# Models whose window no change of RoPE extends.


@dataclass(frozen=True)
class Limit:
    """Why RoPE does not extend the window, and for which stacks."""

    reason: str
    stacks: str = ""
    """Prefix of the names of these stacks; empty for all stacks."""


NO_POSITIONS = frozenset({"cohere2", "cohere2_moe", "exaone4", "exaone_moe", "llama4_text"})
"""Model types whose full-attention layers have no positions if other layers have a sliding window."""


def cannot_extend(config: dict[str, Any]) -> Limit | None:
    """Why no change of RoPE extends the window of this model; None where one does."""
    text, layout = language_model(config)
    if text.get("position_embedding_type") == "nope":
        return Limit("RoPE cannot extend it: its layers have no positions (position_embedding_type: nope)")
    bare = {key: value for key, value in text.items() if key not in {*ROPE_KEYS, "max_position_embeddings"}}
    if load_error(bare) is not None:
        return None
    with quiet():
        loaded = CONFIG_MAPPING[layout.model_type].from_dict(copy.deepcopy(bare))
    kinds = set(getattr(loaded, "layer_types", None) or ())
    short = {kind for kind in kinds if "sliding" in kind or "chunked" in kind}
    sees = getattr(loaded, "sliding_window", None) or getattr(loaded, "attention_chunk_size", None)
    if short and layout.model_type in NO_POSITIONS:
        return Limit(f"RoPE cannot extend it: layers with positions attend to {sees} tokens only, and the "
                     "full-attention layers have no positions")  # fmt: skip
    if not sees or sees >= text["max_position_embeddings"]:
        return None
    if (kinds and kinds == short) or (not kinds and getattr(loaded, "use_sliding_window", True)):
        return Limit(f"RoPE cannot extend it: every layer attends to the last {sees} tokens only (sliding_window)")
    if getattr(loaded, "use_sliding_window", False) and kinds == {FULL}:
        return Limit(
            f"RoPE cannot extend it in vLLM: with use_sliding_window and max_window_layers at the number of layers "
            f"vLLM attends to the last {sees} tokens only in every layer, transformers in none; write "
            "use_sliding_window: false",
            "vllm",
        )
    return None
