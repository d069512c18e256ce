"""What a serving stack computes from a config.json: frequencies, multiplier of cos and sin, and window.

Stacks read the same keys differently, and what they do not read they drop without a word. A `Stack` writes the
differences down as data (`stacks.py` holds all of them, each with its source); `read` applies it to a config.
No weights are read and no engine is run; tests hold the readers against the real code wherever it installs.

Terms: a *section* is the rope dictionary a stack ends up with for one kind of layer; O is its
original_max_position_embeddings, M the config's max_position_embeddings, s its factor. A *table* is inverse
frequencies, float32 `[d/2]`, and the multiplier; a stack with two regimes (longrope) has two tables.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from ..errors import UserError
from ..models import Layout, layout_of, softmax_gain
from ..rope import (
    BETA_FAST,
    BETA_SLOW,
    YarnRamp,
    default_inv_freq,
    linear_inv_freq,
    llama3_inv_freq,
    longrope_attention_factor,
    longrope_inv_freq,
    yarn_inv_freq,
)

Section = dict[str, Any]

ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class Table:
    """What cos and sin are computed from, for prompts of more than `above` tokens."""

    inv_freq: Tensor
    multiplier: float
    above: int = 0


@dataclass(frozen=True)
class EffectiveRope:
    """What one stack makes of one config. With a `refusal` it does not load it, and there are no tables."""

    window: int
    """Longest prompt taken by default."""
    rows: int | None = None
    """Positions cos and sin are held for; None where they are computed as needed."""
    tables: dict[str, tuple[Table, ...]] = field(default_factory=dict)
    """By kind of layer (`""` where all share one), in order of `above`."""
    refusal: str | None = None
    softmax_gain: float = 1.0
    """What latent attention multiplies all logits by on top."""


class Refused(Exception):
    """The stack raises an error on this config."""


@dataclass(frozen=True)
class View:
    """A config as one stack sees it, for one kind of layer."""

    config: dict[str, Any]
    layout: Layout
    section: Section
    partial_rotary_factor: float

    @property
    def rope_type(self) -> str:
        """Under its present name."""
        name = self.section.get("rope_type") or self.section.get("type") or "default"
        return "longrope" if name == "su" else str(name)

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
        """M."""
        return int(self.config["max_position_embeddings"])

    @property
    def original(self) -> int | None:
        """O inside the section."""
        return self.section.get("original_max_position_embeddings")


@dataclass(frozen=True)
class Yarn:
    """How a stack reads `rope_type: yarn`."""

    multiplier: Callable[[Section, float], float]
    """(section, factor in use) -> multiplier of cos and sin."""
    factor: Literal["explicit", "ratio"] = "explicit"
    """The key, or M / O wherever O is given."""
    ramp_over: Literal["original", "longest"] = "original"
    """Which length the betas count turns in."""
    betas: Literal["read", "strict", "fixed"] = "read"
    """Whether 0 and null stand for the default, or (strict) are errors."""
    null_factor: bool = False
    """Whether `factor: null` stands for M / O; elsewhere it is an error."""
    truncate: Literal["read", "by release", "always", "never"] = "read"
    """`by release`: only the newest of these releases read it, so it must not be false."""
    nested_truncate: bool = True
    """Whether `truncate` is read where the section is that of one kind of layer."""
    needs_beta: bool = False
    """Whether yarn is ignored, silently, where the key `beta_fast` is missing."""
    whole_head: bool = False
    """Whether the ramp is computed over the whole head, wrongly where only part of it is rotated."""

    def tables(self, view: View) -> tuple[Table, ...]:
        """The one table there is."""
        section, original = view.section, view.original or view.longest
        factor = section["factor"]
        if (factor is None and self.null_factor) or (self.factor == "ratio" and view.original):
            factor = view.longest / original
        if self.needs_beta and "beta_fast" not in section:
            return (Table(default_inv_freq(view.theta, view.dim), 1.0),)
        if self.whole_head and view.dim != view.layout.head_dim:
            raise Refused("it computes the ramp over the whole head, of which this model rotates only a part")
        if section.get("extrapolation_factor", 1) != 1:
            raise Refused("extrapolation_factor is not 1, which this check does not model")
        fixed = self.betas == "fixed"
        if self.betas == "strict" and not all(section.get(key, 1) for key in ("beta_fast", "beta_slow")):
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
    """The key it reads first; without it (and for `formula` always) sqrt(1 + ln r / ln O)."""
    selects: Literal["by length", "by window", "by release", "long"] = "by length"
    """Long factors from O + 1 tokens on; or always if the window exceeds O; or by a rule that changed; or always."""
    original: Literal["section", "top", "needs top"] = "section"
    """Where O is read, else M; and whether the stack fails without it at the top level."""
    ratio: Literal["lengths", "key", "key without top"] = "lengths"
    """r: M / O, or the key `factor` first (always, or only where there is no O at the top level)."""

    def tables(self, view: View, window: int) -> tuple[Table, ...]:
        """One table, or short and long."""
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


Resolve = Callable[[dict[str, Any], Layout], dict[str, Section]]
"""Config -> section by kind of layer, theta filled in."""


@dataclass(frozen=True)
class Stack:
    """One range of versions of one stack, and how it reads a config."""

    name: str
    """As in `--for`."""
    versions: str
    source: str
    """Pinned; what was read."""
    evidence: str
    """How far it was checked: "run" means its own code ran beside this reader in our tests."""
    sections: Resolve
    yarn: Yarn | str
    """A text is the refusal."""
    longrope: Longrope | str
    window: Callable[[View], int] = lambda view: view.longest
    rows: Callable[[View], int | None] = lambda view: None
    top_partial: bool = False
    """Whether partial_rotary_factor is read at the top level only, as in transformers 4."""
    nested: bool = False
    """Whether sections by kind of layer are known to be read."""
    types: frozenset[str] = frozenset({"default", "linear", "llama3"})
    """Further rope types it reads."""
    unscaled: frozenset[str] = frozenset()
    """Model types it runs without any scaling, silently."""
    refused: dict[str, str] = field(default_factory=dict)
    """Model type -> why it fails."""
    hardwired: dict[str, Yarn] = field(default_factory=dict)
    """Model type -> how it computes its rope, which is YaRN whatever rope_type the config names."""
    latent: bool = False
    """Whether it is known to scale the logits of latent attention (DeepSeek) as transformers does."""
    modelling: frozenset[str] = frozenset()
    """Model types it runs through transformers' own modules."""
    interleaved_longrope: bool = True

    serve: str = ""
    """The command line that serves the checkpoint in the folder EXPORT with a window of WINDOW tokens."""
    default: bool = False
    """Whether an export serves it unless the recipe names stacks."""
    read_on: str = "2026-11-22"

    def command(self, window: int) -> str:
        """`serve` with the window filled in; empty where no command is known."""
        return self.serve.replace("WINDOW", str(window))


def read(stack: Stack, config: dict[str, Any], modelling: Stack | None = None) -> EffectiveRope:
    """What `stack` computes from a config.json (as a dict); `modelling` is the reader of transformers' own modules.

    Raises:
        UserError: if the config is not that of a model with RoPE.
    """
    layout = layout_of(config)
    if not isinstance(config.get("max_position_embeddings"), int):
        raise UserError("config.json: max_position_embeddings is missing or not a whole number")
    if layout.model_type in stack.modelling and modelling is not None:
        inner = read(modelling, config)
        return replace(inner, rows=None)
    try:
        return _read(stack, config, layout)
    except Refused as refusal:
        return EffectiveRope(config["max_position_embeddings"], refusal=str(refusal))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        return EffectiveRope(config["max_position_embeddings"], refusal=f"malformed rope section: {error!r}")


def _read(stack: Stack, config: dict[str, Any], layout: Layout) -> EffectiveRope:
    if layout.model_type in stack.refused:
        raise Refused(stack.refused[layout.model_type])
    if layout.nested and not stack.nested:
        raise Refused("whether it reads one rope section a kind of layer was not established")
    if layout.family.latent and not stack.latent:
        raise Refused("how it scales the logits of latent attention was not established")
    tables, windows, rows, softmax = {}, [], [], 1.0
    for kind, section in stack.sections(config, layout).items():
        top = config.get("partial_rotary_factor", config.get("rotary_pct", layout.partial_rotary_factor))
        partial = top if stack.top_partial else section.get("partial_rotary_factor", top)
        view = View(config, layout, section, float(partial))
        windows.append(stack.window(view))
        rows.append(stack.rows(view))
        tables[kind] = _tables(stack, view, windows[-1])
        softmax = softmax_gain(layout.model_type, section | {"rope_type": view.rope_type})
    held = [count for count in rows if count is not None]
    return EffectiveRope(min(windows), min(held) if held else None, tables, softmax_gain=softmax)


def _tables(stack: Stack, view: View, window: int) -> tuple[Table, ...]:
    kind, section = view.rope_type, view.section
    theta, dim = view.theta, view.dim
    if kind == "default" or view.layout.model_type in stack.unscaled:
        return (Table(default_inv_freq(theta, dim), 1.0),)
    own = stack.hardwired.get(view.layout.model_type)
    if own is not None:
        if kind != "yarn":
            raise Refused(f"it builds the rope of {view.layout.model_type} itself, and knows YaRN alone")
        return own.tables(view)
    if kind == "yarn":
        if view.layout.family.longrope_only:
            raise Refused("Phi-3's config class turns yarn into longrope and then misses the lists of factors")
        if isinstance(stack.yarn, str):
            raise Refused(stack.yarn)
        return stack.yarn.tables(view)
    if kind == "longrope":
        if isinstance(stack.longrope, str):
            raise Refused(stack.longrope)
        if not stack.interleaved_longrope and view.layout.interleaved:
            raise Refused("it takes longrope only where pairs are halves of the head; here they are interleaved")
        return stack.longrope.tables(view, window)
    if kind == "dynamic":
        raise Refused("rope_type dynamic changes with the length read, in each stack in its own way: not compared")
    if kind not in stack.types:
        raise Refused(f"it does not know rope_type {kind!r}")
    if kind == "linear":
        return (Table(linear_inv_freq(theta, dim, section["factor"]), 1.0),)
    low, high, original = (section[k] for k in ("low_freq_factor", "high_freq_factor", ORIGINAL))
    return (Table(llama3_inv_freq(theta, dim, section["factor"], low, high, original), 1.0),)
