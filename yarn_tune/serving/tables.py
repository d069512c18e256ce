"""Frequencies and multiplier of cos and sin that a stack computes from one rope section.

Terms: a *section* is the rope dictionary that a stack ends up with for one kind of layer; O is its
original_max_position_embeddings, M the config's max_position_embeddings, s its factor. A *table* is inverse
frequencies, float32 `[d/2]`, and the multiplier; a stack with two regimes (longrope) has two tables.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..models import Layout
from ..rope import (
    BETA_FAST,
    BETA_SLOW,
    YarnRamp,
    default_inv_freq,
    llama3_inv_freq,
    longrope_attention_factor,
    longrope_inv_freq,
    ntk_inv_freq,
    proportional_inv_freq,
    yarn_attention_factor,
    yarn_inv_freq,
)
from ..rope import yarn_gain as gain

Section = dict[str, Any]

ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class Table:
    """The numbers that cos and sin are computed from, for prompts of more than `above` tokens."""

    inv_freq: Tensor
    multiplier: float
    above: int = 0


class Refused(Exception):
    """The stack raises an error on this config."""


class NotEstablished(Refused):
    """How the stack reads this config is not known."""


class NotRun(Refused):
    """This release of the stack has no such model."""


@dataclass(frozen=True)
class View:
    """A config as one stack reads it, for one kind of layer."""

    config: dict[str, Any]
    """Config of the language model; it has max_position_embeddings."""
    layout: Layout
    section: Section
    partial_rotary_factor: float

    @property
    def rope_type(self) -> str:
        """The rope type of the section; `default` if it has none."""
        name = self.section.get("rope_type", self.section.get("type", "default"))
        if name is None:
            raise Refused("rope_type is null")
        return str(name)

    @property
    def theta(self) -> float:
        """Base of the frequencies."""
        return float(self.section["rope_theta"])

    @property
    def dim(self) -> int:
        """Rotary dimensions."""
        return self.layout.rotary_dim(self.partial_rotary_factor)

    @property
    def longest(self) -> int:
        """M, the config's max_position_embeddings."""
        return int(self.config["max_position_embeddings"])

    @property
    def original(self) -> int | None:
        """O in the section; None if it is missing."""
        return self.section.get(ORIGINAL)

    def number(self, key: str) -> float:
        """A number that the stack needs under this key of the section."""
        if key not in self.section:
            raise Refused(f"it needs {key} in the rope section")
        if self.section[key] is None:
            raise Refused(f"it computes with {key}, which is null, and fails")
        return float(self.section[key])


# The multiplier of cos and sin under YaRN.


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


def deepseek_multiplier(section: Section, factor: float) -> float:
    """As `mscale_multiplier`, x attn_factor."""
    return mscale_multiplier(section, factor) * float(section.get("attn_factor", 1.0))


def turbomind_multiplier(section: Section, factor: float) -> float:
    """As `hf_multiplier`, but from the factor in the file, not the one in use; an mscale of 0 counts as given."""
    written = section["factor"]
    given, weight, all_dim = (section.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    if written is None:
        raise Refused("without attention_factor it needs a factor that is a number")
    return gain(written) if weight is None or all_dim is None else gain(written, weight) / gain(written, all_dim)


def own_multiplier(section: Section, factor: float) -> float:
    """0.1 ln s + 1; no key of the config changes it."""
    return gain(factor)


def genai_multiplier(section: Section, factor: float) -> float:
    """The mscale ratio if both are positive; mscale alone is the multiplier itself; else 0.1 ln s + 1."""
    weight, all_dim = section.get("mscale"), section.get("mscale_all_dim")
    return float(weight) if weight and not all_dim else yarn_attention_factor(factor, weight, all_dim)


@dataclass(frozen=True)
class Yarn:
    """How a stack reads `rope_type: yarn`."""

    multiplier: Callable[[Section, float], float]
    """(section, factor in use) -> multiplier of cos and sin."""
    factor: Literal["explicit", "ratio"] = "explicit"
    """`explicit`: the key `factor`; `ratio`: M / O if O is given."""
    ramp_over: Literal["original", "longest"] = "original"
    """The length over which the betas count turns."""
    betas: Literal["read", "strict", "named", "fixed"] = "read"
    """`read`: 0 and null mean the default; `strict`: they are errors; `named`: a missing key is an error too;
    `fixed`: the keys are not read."""
    null_factor: bool = False
    """Whether `factor: null` means M / O; otherwise it is an error."""
    truncate: Literal["read", "by release", "always", "never"] = "read"
    """`by release`: only the newest of these releases read it, so it must not be false."""
    nested_truncate: bool = True
    """Whether `truncate` is read where the section is that of one kind of layer."""
    needs_beta: bool = False
    """Whether yarn is silently ignored if the key `beta_fast` is missing."""
    whole_head: bool = False
    """Whether the ramp is computed over the whole head, wrongly where only part of it is rotated."""
    any_type: bool = False
    """For the model types of `Stack.hardwired`: whether every rope type but `default` is computed as YaRN."""

    def tables(self, view: View) -> tuple[Table, ...]:
        """The table of a view, as a tuple of one."""
        section, original = view.section, view.original or view.longest
        null = section.get("factor", 0) is None and self.null_factor
        ratio = self.factor == "ratio" and view.original and "factor" in section
        factor = view.longest / original if null or ratio else view.number("factor")
        if self.betas == "named" and not {"beta_fast", "beta_slow"} <= section.keys():
            raise Refused("it takes beta_fast and beta_slow from the rope section, which must have both")
        if self.needs_beta and "beta_fast" not in section:
            return (Table(default_inv_freq(view.theta, view.dim), 1.0),)
        if self.whole_head and view.dim != view.layout.head_dim:
            raise Refused("it computes the ramp over the whole head, of which this model rotates only a part")
        if section.get("extrapolation_factor", 1) != 1:
            raise Refused("extrapolation_factor is not 1, which this check does not model")
        fixed = self.betas == "fixed"
        if self.betas in ("strict", "named") and not all(section.get(key, 1) for key in ("beta_fast", "beta_slow")):
            raise Refused("it computes with a beta of 0 or null as written, and fails")
        if self.truncate == "by release" and not section.get("truncate", True):
            raise Refused("truncate is false, and not all of these releases read it")
        reads = self.truncate in ("read", "by release")
        truncate = self.truncate == "always" or (reads and section.get("truncate", True))
        if view.layout.nested and not self.nested_truncate:
            truncate = True
        ramp = YarnRamp(
            original if self.ramp_over == "original" else view.longest,
            BETA_FAST if fixed else section.get("beta_fast") or BETA_FAST,
            BETA_SLOW if fixed else section.get("beta_slow") or BETA_SLOW,
            truncate=bool(truncate),
        )
        inv_freq = yarn_inv_freq(view.theta, view.dim, float(factor), ramp)
        return (Table(inv_freq, self.multiplier(section, float(factor))),)


@dataclass(frozen=True)
class Longrope:
    """How a stack reads `rope_type: longrope`."""

    multiplier: Literal["attention_factor", "mscale", "formula"]
    """The key with the multiplier; without the key, and always for `formula`, it is sqrt(1 + ln r / ln O)."""
    selects: Literal["by length", "by window", "by release", "long"] = "by length"
    """When the long factors are used. `by length`: from O + 1 tokens on; `by window`: if the window exceeds O;
    `by release`: by a rule that differs between releases; `long`: always."""
    original: Literal["section", "top", "needs top"] = "section"
    """Where O is read (M is the default); with `needs top` the stack fails without O at the top level."""
    ratio: Literal["lengths", "key", "key without top"] = "lengths"
    """How r is computed. `lengths`: M / O; `key`: the key `factor`, else M / O; `key without top`: the same, but M / O
    if O is at the top level."""

    def tables(self, view: View, window: int) -> tuple[Table, ...]:
        """The tables of a view: one, or the short and the long one."""
        section, top = view.section, view.layout.original
        if self.original == "needs top" and top is None:
            raise Refused("it needs original_max_position_embeddings at the top level of the config")
        original = (view.original if self.original == "section" else None) or top or view.longest
        if original <= 1:
            raise Refused("an original length of 1 divides by zero")
        keyed = self.ratio == "key without top" and top is None
        used = self.selects == "by release" or section.get("attention_factor") is None
        if keyed and used and section.get("factor") is None:
            raise Refused("it needs factor, or original_max_position_embeddings at the top level of the config")
        by_key = keyed or self.ratio == "key"
        ratio = section["factor"] if by_key and section.get("factor") is not None else view.longest / original
        formula = longrope_attention_factor(ratio, original)
        if self.selects == "long" or (self.selects == "by window" and window > original):
            return (self._table(view, "long", formula),)
        if self.selects == "by release" and section["short_factor"] != section["long_factor"]:
            raise Refused("short_factor and long_factor differ, and which is used differs from release to release")
        short = self._table(view, "short", formula)
        if self.selects in ("by window", "by release") or window <= original:
            return (short,)
        return short, replace(self._table(view, "long", formula), above=original)

    def _table(self, view: View, name: str, formula: float) -> Table:
        keys = {"attention_factor": "attention_factor", "mscale": f"{name}_mscale", "formula": ""}
        multiplier = view.section.get(keys[self.multiplier])
        factors = [float(f) for f in view.section[f"{name}_factor"]]
        if len(factors) != view.dim // 2:
            raise Refused(f"{name}_factor has {len(factors)} entries for {view.dim // 2} pairs")
        inv_freq = longrope_inv_freq(view.theta, view.dim, factors)
        return Table(inv_freq, formula if multiplier is None else float(multiplier))


def proportional_table(view: View, factor: float) -> Table:
    """The table of Gemma 4's full-attention layers: a first share of the pairs rotates, the others have frequency 0.

    All are divided by `factor`, the key of that name, which vLLM does not read (gemma4_rope.py of 0.28 and 0.32).
    """
    head_dim = view.layout.full_head_dim
    rotated = int(view.partial_rotary_factor * head_dim // 2)
    inv_freq = torch.zeros(head_dim // 2)
    inv_freq[:rotated] = proportional_inv_freq(view.theta, 2 * rotated, head_dim)
    return Table(inv_freq / factor, 1.0)


def dynamic_table(view: View, from_alpha: bool) -> Table:
    """The table of dynamic NTK scaling for prompts of at most M tokens: in most stacks that of unscaled RoPE.

    With `alpha` in the section (HunYuan) theta is multiplied once, by alpha^(d / (d - 2)).
    """
    alpha = view.section.get("alpha") if from_alpha else None
    if alpha:
        return Table(ntk_inv_freq(view.theta, view.dim, float(alpha)), 1.0)
    view.number("factor")
    return Table(default_inv_freq(view.theta, view.dim), 1.0)


def vllm_dynamic_table(view: View) -> Table:
    """Compute the one table that vLLM has: unscaled RoPE, unless max_trained_positions is in the section."""
    if "alpha" in view.section:
        return Table(ntk_inv_freq(view.theta, view.dim, view.number("alpha")), 1.0)
    factor, trained = view.number("factor"), float(view.section.get("max_trained_positions") or view.longest)
    growth = factor * view.longest / trained - (factor - 1)
    return Table(ntk_inv_freq(view.theta, view.dim, growth), 1.0)


def llama3_table(view: View) -> Table:
    """The table of Llama 3.1's scaling."""
    low, high, original = (view.number(key) for key in ("low_freq_factor", "high_freq_factor", ORIGINAL))
    return Table(llama3_inv_freq(view.theta, view.dim, view.number("factor"), low, high, int(original)), 1.0)
