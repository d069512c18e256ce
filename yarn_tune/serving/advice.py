"""Known mistakes in a rope config, in words: what is wrong, who reads it how, and what to write."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..models import FULL, ROPE_KEYS, Layout, is_foreign, language_model, spelling_mistakes
from ..rope import yarn_attention_factor
from .rules import SGLANG_KEYS, VLLM_KEYS, v5_sections, vllm_length
from .stacks import AFTER_4_57
from .tables import ORIGINAL, Refused, Section

NEARLY = 0.95
"""A window of at least this share of the extended length is taken as intended (1M of 4 x 262144)."""
BARELY = 1.5
"""A window of less than this many times the original length makes an extension useless."""


@dataclass(frozen=True)
class Written:
    """The rope section of one kind of layer as it is written, and where."""

    text: dict[str, Any]
    layout: Layout
    section: Section
    kind: str

    @property
    def rope_type(self) -> str | None:
        """The rope type as written; None if there is none."""
        return self.section.get("rope_type") or self.section.get("type")

    @property
    def longest(self) -> int:
        """The config's max_position_embeddings."""
        return int(self.text["max_position_embeddings"])

    @property
    def original(self) -> int | None:
        """The original length that transformers 5 and vLLM read: the one at the top level first."""
        value = self.layout.original or self.section.get(ORIGINAL)
        return None if value is None else int(value)


def explain(config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(traps, errors) of a config in plain words; an error makes it wrong for every stack."""
    text, layout = language_model(config)
    errors, traps = spelling_mistakes(config, text), list(_windows(text, layout))
    errors += [*_misplaced(config), *_dropped(text, layout)]
    # The default theta of a checkpoint with its own code is not known here.
    errors += [] if is_foreign(config) else _theta(text, layout)
    traps += [*_theta_unusual(text, layout), *([] if is_foreign(config) else _spellings(text, layout))]
    for written in _written(text, layout):
        where = f" ({written.kind})" if written.kind else ""
        errors += [message + where for rule in ERRORS for message in rule(written)]
        traps += [message + where for rule in TRAPS for message in rule(written)]
    return list(dict.fromkeys(traps)), list(dict.fromkeys(errors))


def config_errors(config: dict[str, Any]) -> list[str]:
    """The errors of `explain`, for commands that start from a base's config."""
    return explain(config)[1]


def _written(text: Section, layout: Layout) -> list[Written]:
    scaling, parameters = text.get("rope_scaling") or {}, text.get("rope_parameters") or {}
    if not layout.nested:
        return [Written(text, layout, scaling or parameters, "")]
    parts = {kind: parameters.get(kind) or {} for kind in layout.kinds}
    if FULL in parts:
        parts[FULL] = parts[FULL] | scaling
    return [Written(text, layout, part, kind) for kind, part in parts.items()]


# About the config as a whole.


def _misplaced(config: dict[str, Any]) -> Iterator[str]:
    """Rope keys beside the text config of a wrapper."""
    inner = next((key for key in ("text_config", "llm_config") if isinstance(config.get(key), dict)), None)
    if inner is None:
        return
    for key in (*sorted(ROPE_KEYS), *([] if "max_position_embeddings" in config[inner] else [])):
        if config.get(key) and config.get(key) != config[inner].get(key):
            yield (
                f"{key} is at the top level of a {config.get('model_type')} config, whose language model is "
                f'configured in {inner}; write it there (with --hf-overrides: {{"{inner}": {{"{key}": ...}}}})'
            )


def _dropped(text: Section, layout: Layout) -> Iterator[str]:
    """A single section in a family that has one per kind of layer, and the reverse."""
    section = text.get("rope_parameters") or {}
    kinds = ", ".join(layout.kinds)
    scaled = {section.get("rope_type"), section.get("type")} - {None, "default"}
    flat = layout.nested and scaled and not set(section) & set(layout.kinds)
    if flat and _read_type(text, layout) not in scaled:
        yield (
            f"rope_parameters is one section, but {layout.model_type} has one per kind of layer ({kinds}): "
            f"transformers and vLLM ignore it, so its {scaled.pop()} scaling is dropped (multiplier 1); write "
            f'{{"rope_parameters": {{"{FULL}": {{...}}, ...}}}}'
        )
    parts = [key for key, value in section.items() if isinstance(value, dict)]
    if not layout.nested and parts:
        yield (
            f"rope_parameters has one section per kind of layer ({', '.join(parts)}), but all layers of "
            f"{layout.model_type} share one: write that one without the names of the kinds"
        )


def _read_type(text: Section, layout: Layout) -> str | None:
    """The rope type of the full-attention layers as transformers 5 loads it."""
    try:
        sections = v5_sections(text, layout)
    except Refused:
        return None
    section = sections.get(FULL) or next(iter(sections.values()), {})
    return section.get("rope_type")


def _theta(text: Section, layout: Layout) -> Iterator[str]:
    scaling = text.get("rope_scaling") or text.get("rope_parameters")
    types = {written.rope_type for written in _written(text, layout)}
    default = layout.thetas.get(FULL) or next(iter(layout.thetas.values()))
    if scaling and not _theta_written(text, layout) and default == 1e4 and types & {"yarn", "llama3", "longrope"}:
        yield (
            "theta lost: rope_theta is neither beside the rope section nor in the one that is read, so every "
            f"reader falls back to {default:g}; write the rope_theta that the model was trained with"
        )


def _theta_unusual(text: Section, layout: Layout) -> Iterator[str]:
    default = layout.thetas.get(FULL) or next(iter(layout.thetas.values()))
    long = text["max_position_embeddings"] > 16384
    if not _theta_written(text, layout) and default == 1e4 and long and not list(_theta(text, layout)):
        yield (
            f"rope_theta is not written, so every reader takes {default:g}, which is unusual for a window of "
            f"{text['max_position_embeddings']} tokens; make sure that it is the theta the model was trained with"
        )


def _theta_written(text: Section, layout: Layout) -> bool:
    if text.get(layout.family.theta_key) is not None or text.get("rope_theta") is not None:
        return True
    section: Section = text.get("rope_scaling") or text.get("rope_parameters") or {}
    parts = [(text.get("rope_parameters") or {}).get(FULL) or {}] if layout.nested else [section]
    return all(part.get("rope_theta") is not None for part in parts)


def _spellings(text: Section, layout: Layout) -> Iterator[str]:
    """What differs between rope_scaling and rope_parameters, and between the top level and the section."""
    scaling, parameters = text.get("rope_scaling"), text.get("rope_parameters")
    if parameters and not scaling and layout.model_type not in AFTER_4_57:
        yield (
            "written for transformers 5 only: rope_parameters without rope_scaling and rope_theta; transformers 4, "
            "vLLM before 0.20 on transformers 4, and others read theta 10000 and no scaling"
        )
    if scaling and parameters and not layout.nested and _plain(scaling) != _plain(parameters):
        yield (
            "rope_scaling and rope_parameters differ: transformers and vLLM take rope_scaling, llama.cpp and "
            "ONNX GenAI rope_parameters; write the same section under both"
        )
    section = scaling or parameters or {}
    inside = section.get(ORIGINAL) if not layout.nested else None
    if inside and layout.original and inside != layout.original:
        yield (
            f"{ORIGINAL} is {layout.original} at the top level and {inside} in the rope section: transformers 5 and "
            "vLLM take the first, transformers 4 and LMDeploy the second; write it once, in the section"
        )


def _plain(section: Section) -> Section:
    renamed = {("rope_type" if key == "type" else key): value for key, value in section.items()}
    return {key: value for key, value in renamed.items() if key not in ("rope_theta", "partial_rotary_factor")}


def _windows(text: Section, layout: Layout) -> Iterator[str]:
    """A window that vLLM reads from another key than max_position_embeddings."""
    longest, found = text["max_position_embeddings"], vllm_length(text)
    if found == longest:
        return
    key = "model_max_length" if text.get("model_max_length") else next(k for k in VLLM_KEYS if text.get(k) == found)
    who = "vLLM and SGLang take" if key in SGLANG_KEYS else "vLLM takes"
    yield (
        f"{key} is {found} and max_position_embeddings {longest}: {who} {key} for the window"
        + (", and so it is the native one" if layout.model_type.startswith("cohere") else "")
    )


# About one section.


def _no_type(written: Written) -> Iterator[str]:
    factor = written.section.get("factor")
    if written.rope_type is None and factor not in (None, 1):
        yield (
            f"the rope section has factor {factor:g} but no rope_type: nothing is scaled, and vLLM multiplies its "
            f'window by {factor:g}; write the rope_type, such as "yarn"'
        )


def _yarn_length(written: Written) -> Iterator[str]:
    """A window that makes the extension useless, or an original length that is missing."""
    factor, longest, original = written.section.get("factor"), written.longest, written.original
    if written.rope_type not in ("yarn", "llama3", "longrope") or not isinstance(factor, int | float):
        return
    if original is None:
        yield (
            f"{ORIGINAL} is missing: readers take max_position_embeddings ({longest}) for it, so that the factor is "
            f"applied to {longest}, and older vLLM takes prompts of {int(longest * factor)} tokens. Write "
            f"{ORIGINAL}, the length that the model was trained with (not yet multiplied by {factor:g})"
        )
    elif written.rope_type == "yarn" and factor > 1 and longest < min(BARELY, NEARLY * factor) * original:
        left = "max_position_embeddings left at native: " if longest <= original else ""
        yield (
            f"{left}the section extends to {int(original * factor)} tokens, but vLLM from 0.30 and others take prompts "
            f"of at most {longest} (max_position_embeddings), so that factor {factor:g} has no effect; write "
            f"max_position_embeddings {int(original * factor)}"
        )


def _table_short(written: Written) -> Iterator[str]:
    factor, longest = written.section.get("factor"), written.longest
    if written.rope_type != "yarn" or not isinstance(factor, int | float) or written.original is None:
        return
    if written.original * factor < longest:
        yield (
            f"table too short: {written.original} x {factor:g} gives vLLM cos and sin for "
            f"{math.ceil(written.original * factor)} positions, but max_position_embeddings allows {longest} tokens; "
            "beyond the table vLLM from 0.30 computes NaN without an error, and older releases take at most "
            f"{int(written.original * factor)} tokens; write a factor of at least {longest / written.original:g}"
        )


def _name(written: Written) -> Iterator[str]:
    name = written.rope_type
    known = ("yarn", "linear", "dynamic", "longrope", "llama3", "default")
    if name is not None and name not in known and name.lower() in known:
        yield f"rope_type {name!r} is not known to any stack, since names are lower case; write {name.lower()!r}"
    if "rope_type" in written.section and written.section["rope_type"] is None:
        yield "rope_type is null, which transformers and vLLM refuse even if type has a value; write rope_type alone"


def _yarn_reach(written: Written) -> Iterator[str]:
    factor, longest, original = written.section.get("factor"), written.longest, written.original
    if written.rope_type != "yarn" or not isinstance(factor, int | float) or original is None:
        return
    if max(BARELY, 1) * original <= longest < NEARLY * factor * original:
        yield (
            f"the section extends to {int(original * factor)} tokens, but max_position_embeddings is {longest}: vLLM "
            f"from 0.30 and others take no longer prompts; write {int(original * factor)}, or a smaller factor"
        )


def _yarn_multiplier(written: Written) -> Iterator[str]:
    section, factor = written.section, written.section.get("factor")
    if written.rope_type != "yarn":
        return
    if factor is None:
        if "factor" in section:
            yield "factor is null: transformers takes max_position_embeddings / original, others fail"
        return
    given, own = section.get("attention_factor"), yarn_attention_factor(factor)
    if given is not None and abs(given / own - 1) > 1e-6 and "attn_factor" not in section:
        yield (
            f"attention_factor ignored: transformers and vLLM from 0.30 multiply cos and sin by {given:.6g}; vLLM up "
            f"to 0.29 and SGLang read only attn_factor and use {own:.6g}. Write attn_factor = {given / own:.6g} too"
        )
    ratio = section.get("attn_factor")
    used = (
        yarn_attention_factor(factor, section.get("mscale"), section.get("mscale_all_dim")) if given is None else given
    )
    if ratio is not None and abs(own * ratio / used - 1) > 1e-6:
        yield (
            f"attn_factor ignored: transformers 5 and vLLM from 0.30 do not read attn_factor and multiply cos and sin "
            f"by {used:.6g}; vLLM up to 0.29 and SGLang use {own * ratio:.6g}. Write attention_factor = "
            f"{own * ratio:.6g} too"
        )
    if section.get("truncate", True) is False and written.kind:
        yield (
            "truncate nested: transformers 5 does not read truncate inside the section of one kind of layer and rounds "
            "the ramp; vLLM reads it and does not round"
        )


def _multiplied(written: Written) -> Iterator[str]:
    name, factor = written.rope_type, written.section.get("factor")
    if name in ("linear", "dynamic", "ntk") and factor not in (None, 1) and "gemma3" not in written.layout.model_type:
        yield (
            f"vLLM multiplies the window by the factor under {name}: {vllm_length(written.text)} x {factor:g} = "
            f"{int(vllm_length(written.text) * factor)} tokens, and so does SGLang. If {written.longest} is the "
            "extended window already, it is multiplied once more: serve with --max-model-len, or write the original one"
        )
    if name == "dynamic" and not written.section.get("alpha"):
        yield (
            f"dynamic: transformers computes the frequencies anew for each prompt of more than {written.longest} "
            f"tokens; vLLM computes them once, as for {written.longest} tokens"
        )


def _longrope(written: Written) -> Iterator[str]:
    section = written.section
    if written.rope_type not in ("longrope", "su"):
        return
    if section.get("short_factor") != section.get("long_factor"):
        yield (
            "short_factor and long_factor differ: transformers switches at the original length in every call, vLLM "
            "once by its longest prompt, SGLang by the longest in the batch; keys cached before a switch do not match "
            "those after it"
        )
    if not {"short_mscale", "long_mscale"} <= section.keys():
        yield (
            "no short_mscale and long_mscale: vLLM and SGLang do not read attention_factor under longrope and "
            "compute a multiplier from the lengths instead"
        )


def _growing_queries(written: Written) -> Iterator[str]:
    beta = written.section.get("llama_4_scaling_beta")
    if beta:
        yield (
            f"llama_4_scaling_beta: transformers multiplies queries by 1 + {beta:g} ln(1 + floor(position / "
            f"{written.original})); vLLM reads only a top-level llama_4_scaling with beta and {ORIGINAL}"
        )


Rule = Callable[[Written], Iterator[str]]
ERRORS: tuple[Rule, ...] = (_no_type, _yarn_length, _table_short, _name)
TRAPS: tuple[Rule, ...] = (_yarn_reach, _yarn_multiplier, _multiplied, _longrope, _growing_queries)
