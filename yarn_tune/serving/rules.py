"""The parts in which stacks differ: where they look for a section, what multiplies cos and sin, how far they reach."""

import math
from dataclasses import replace

from ..models import FULL, Layout
from ..rope import yarn_attention_factor
from ..rope import yarn_gain as gain
from .readers import ORIGINAL, Refused, Section, View

# Where the section and theta come from.


def beside(config: Section, layout: Layout) -> float | None:
    """Theta at the top level, under the family's name for it."""
    return config.get(layout.family.theta_key)


def v5_sections(config: Section, layout: Layout) -> dict[str, Section]:
    """Version 5: rope_scaling wins over rope_parameters; theta inside it, else beside it, else the family's.

    O at the top level wins over O inside, and M stands in for both.
    """
    filled = {ORIGINAL: config["max_position_embeddings"]}
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    if layout.nested:
        parts = {k: dict((parameters or {}).get(k) or {"rope_type": "default"}) for k in layout.kinds}
        parts[FULL] = parts.get(FULL, {}) | (scaling or {})
        # OLMo 3's config class asks for rope_theta twice and gets it once: it never reaches the other layers.
        thetas = {k: beside(config, layout) if k == FULL else config.get("rope_local_base_freq") for k in parts}
        return {k: filled | {"rope_theta": thetas[k] or layout.thetas[k]} | part for k, part in parts.items()}
    section = dict(scaling or parameters or {})
    if layout.original is not None:
        section[ORIGINAL] = layout.original
    return {"": filled | {"rope_theta": beside(config, layout) or layout.thetas[""]} | section}


def vllm_sections(config: Section, layout: Layout) -> dict[str, Section]:
    """As version 5, but `rope_type` and `type` may not differ."""
    sections = v5_sections(config, layout)
    for section in sections.values():
        names = {section.get("rope_type"), section.get("type")} - {None}
        if len(names) > 1 and names != {"longrope", "su"}:
            raise Refused("rope_type and type differ in one section")
    return sections


def lmdeploy_sections(config: Section, layout: Layout) -> dict[str, Section]:
    """As version 5, whose config classes it uses; but not the modules, which take O from the top level as well."""
    return v5_sections(config, layout if layout.family.longrope_only else replace(layout, original=None))


def v4_sections(config: Section, layout: Layout) -> dict[str, Section]:
    """Version 4: rope_scaling, and theta beside it."""
    section = dict(config.get("rope_scaling") or {})
    if not layout.nested:
        return {"": section | {"rope_theta": beside(config, layout) or layout.thetas[""]}}
    theta = beside(config, layout) or layout.thetas[FULL]
    local = config.get("rope_local_base_freq") or (theta if layout.family.theta_everywhere else None)
    parts = {kind: {"rope_theta": local or layout.thetas[kind]} for kind in layout.kinds}
    return parts | {FULL: section | {"rope_theta": theta}}


def parameters_first(config: Section, layout: Layout) -> dict[str, Section]:
    """First rope_parameters, else rope_scaling; theta inside, else beside."""
    section = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    return {"": {"rope_theta": config.get("rope_theta") or layout.thetas.get("", 1e4)} | section}


def scaling_first(config: Section, layout: Layout) -> dict[str, Section]:
    """First rope_scaling, else rope_parameters; theta beside, else inside."""
    section = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = config.get("rope_theta") or section.get("rope_theta") or layout.thetas.get("", 1e4)
    return {"": section | {"rope_theta": theta}}


# What multiplies cos and sin under yarn.


def hf_multiplier(section: Section, factor: float) -> float:
    """The key attention_factor, else the mscale pair, else 0.1 ln s + 1."""
    given = section.get("attention_factor")
    if given is not None:
        return float(given)
    return yarn_attention_factor(factor, section.get("mscale"), section.get("mscale_all_dim"))


def attention_factor_only(section: Section, factor: float) -> float:
    """The key attention_factor, else 0.1 ln s + 1."""
    given = section.get("attention_factor")
    return float(given if given is not None else gain(factor))


def lmdeploy_multiplier(section: Section, factor: float) -> float:
    """The key attention_factor, else the mscale pair, else 0.1 ln s + 1; a null is not the same as no key."""
    weight, all_dim = section.get("mscale", 1.0), section.get("mscale_all_dim", 0.0)
    if section.get("attention_factor") is not None:
        return float(section["attention_factor"])
    if "attention_factor" in section or (weight and all_dim):
        return gain(factor, weight) / gain(factor, all_dim)
    return gain(factor)


def old_hf_multiplier(section: Section, factor: float) -> float:
    """The key attention_factor, else 0.1 ln s + 1 also below s = 1."""
    given = section.get("attention_factor")
    return float(given if given is not None else 0.1 * math.log(factor) + 1.0)


def old_vllm_multiplier(section: Section, factor: float) -> float:
    """(0.1 ln s + 1) x attn_factor, or attn_factor alone if apply_yarn_scaling is false."""
    own = gain(factor) if section.get("apply_yarn_scaling", True) else 1.0
    return own * float(section.get("attn_factor", 1.0))


def sglang_multiplier(section: Section, factor: float) -> float:
    """(mscale ratio, else 0.1 ln s + 1) x attn_factor."""
    weight, all_dim = section.get("mscale"), section.get("mscale_all_dim")
    own = gain(factor) if weight is None or all_dim is None else gain(factor, weight) / gain(factor, all_dim)
    return own * float(section.get("attn_factor", 1.0))


def mscale_multiplier(section: Section, factor: float) -> float:
    """The mscale ratio, with 1 and 0 where a key is missing."""
    return gain(factor, section.get("mscale", 1.0)) / gain(factor, section.get("mscale_all_dim", 0.0))


def turbomind_multiplier(section: Section, factor: float) -> float:
    """As Hugging Face, but from the factor as written, not from the one in use; an mscale of 0 counts as given."""
    written = section["factor"]
    given, weight, all_dim = (section.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    if written is None:
        raise Refused("without attention_factor it needs a factor that is a number")
    return gain(written) if weight is None or all_dim is None else gain(written, weight) / gain(written, all_dim)


def own_multiplier(section: Section, factor: float) -> float:
    """0.1 ln s + 1, whatever the config says."""
    return gain(factor)


def genai_multiplier(section: Section, factor: float) -> float:
    """The mscale ratio if both are positive; mscale alone is the multiplier itself; else 0.1 ln s + 1."""
    weight, all_dim = section.get("mscale"), section.get("mscale_all_dim")
    return float(weight) if weight and not all_dim else yarn_attention_factor(factor, weight, all_dim)


# Windows and tables that follow from the section.


def old_vllm_window(view: View) -> int:
    """O x s for yarn (but M for Gemma 3), M x s for linear; M, or O where it stands at the top level, for longrope."""
    factor = view.section.get("factor")
    if view.rope_type == "yarn" and factor is not None and view.layout.model_type != "gemma3_text":
        return int((view.original or view.longest) * factor)
    return vllm_window(view)


def vllm_window(view: View) -> int:
    """M; M x s for linear; for longrope O if it stands at the top level."""
    if view.rope_type == "linear":
        return int(view.longest * view.section.get("factor", 1.0))
    if view.rope_type == "longrope" and view.layout.original is not None:
        return int(view.layout.original)
    return view.longest


def vllm_rows(view: View) -> int:
    """Yarn holds ceil(O x s) positions, whatever the window; linear ceil(M x s)."""
    factor = view.section.get("factor")
    if view.rope_type in ("yarn", "linear") and factor is not None:
        original = view.original if view.rope_type == "yarn" else None
        return int(math.ceil((original or view.longest) * factor))
    return vllm_window(view)


def sglang_window(view: View) -> int:
    """M, scaled by the factor where O is not given."""
    unscaled = view.original is not None or view.rope_type in ("llama3", "default")
    return int(view.longest * (1.0 if unscaled else view.section.get("factor", 1.0)))
