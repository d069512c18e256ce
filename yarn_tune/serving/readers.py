"""What a serving stack computes from a config.json: frequencies, multiplier of cos and sin, and window.

Stacks read the same keys differently, and ignore the keys that they do not read. A `Stack` holds these differences as
data (`stacks.py` has a row per stack, each with its source); `read` applies it to a config. No weights are read and no
engine is run; tests compare the readers with the real code wherever it can be installed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..models import Family, Layout, language_model
from ..rope import default_inv_freq, linear_inv_freq, ntk_inv_freq
from ..rope import yarn_gain as gain
from .tables import (
    ORIGINAL,
    Longrope,
    NotEstablished,
    NotRun,
    Refused,
    Section,
    Table,
    View,
    Yarn,
    dynamic_table,
    llama3_table,
    proportional_table,
    vllm_dynamic_table,
)

State = Literal["read", "does not load", "not run by this release", "not established"]


@dataclass(frozen=True)
class EffectiveRope:
    """What one stack computes from one config. Unless the state is `read` there are no tables, but a reason."""

    window: int
    """Longest prompt that is accepted by default, in tokens."""
    rows: int | None = None
    """Positions that cos and sin are stored for; None where they are computed as needed."""
    tables: dict[str, tuple[Table, ...]] = field(default_factory=dict)
    """Kind of layer (`""` if all layers share one section) -> its tables, in order of `above`."""
    state: State = "read"
    reason: str = ""
    softmax_gain: float = 1.0
    """Additional multiplier of all logits, which latent attention derives from mscale_all_dim."""
    query_growth: tuple[float, int] | None = None
    """(beta, O): queries at position p are multiplied by 1 + beta ln(1 + floor(p / O)) (Ministral 3, Mistral 4)."""
    qk_bias: bool = False
    """Whether the stack is known to add biases of queries and keys in models of this family."""

    @property
    def refusal(self) -> str | None:
        """The reason why there are no tables; None where there are."""
        return None if self.state == "read" else self.reason


Resolve = Callable[[dict[str, Any], Layout], dict[str, Section]]
"""Config -> section by kind of layer, theta filled in."""


@dataclass(frozen=True)
class Stack:
    """One range of versions of one stack, and how it reads a config."""

    name: str
    """The name of the stack in `--for`."""
    versions: str
    source: str
    """Pinned URL of the source that was read."""
    evidence: str
    """How this reader was checked: "run" means that the tests compare it with the stack's own code."""
    sections: Resolve
    yarn: Yarn | str
    """How it reads `rope_type: yarn`; a string is the reason why it refuses that type."""
    longrope: Longrope | str
    window: Callable[[list[View]], int] = lambda views: views[0].longest
    rows: Callable[[View], int | None] = lambda view: None
    top_partial: bool = False
    """Whether partial_rotary_factor is read at the top level only, as in transformers 4."""
    nested: bool = False
    """Whether sections per kind of layer are known to be read."""
    type_only: frozenset[str] = frozenset()
    """Model types with a section per kind of layer, of which it reads rope_type, theta and the rotated share alone."""
    types: frozenset[str] = frozenset({"default", "linear", "llama3"})
    """Rope types it reads beside yarn and longrope."""
    other_types: frozenset[str] = frozenset()
    """Rope types that it reads in a way that was not established."""
    unscaled: frozenset[str] = frozenset()
    """Model types it runs without any scaling and without a message."""
    refused: dict[str, str] = field(default_factory=dict)
    """Model type -> why it fails."""
    hardwired: dict[str, Yarn] = field(default_factory=dict)
    """Model type -> how it computes its rope, which is YaRN whatever rope_type the config names."""
    deepseek: Yarn | None = None
    """How it reads `rope_type: deepseek_yarn`; None if it does not."""
    latent: frozenset[str] = frozenset()
    """Model types with latent attention (DeepSeek) whose logits it multiplies by a gain of mscale_all_dim."""
    ignores_mscale: frozenset[str] = frozenset()
    """Model types with latent attention whose logits it does not multiply."""
    others_plain: bool = False
    """Whether it is established that it multiplies the logits of no other type with latent attention."""
    softmax_key: str = ""
    """Key of the section that switches this multiplier of logits off if its value is `softmax_off`."""
    softmax_off: float | bool = False
    modelling: frozenset[str] = frozenset()
    """Model types it runs through transformers' own modules."""
    interleaved_longrope: bool = True
    mrope: bool = False
    """Whether it runs models with a position per axis of an image; on text they rotate as others do."""
    mrope_types: frozenset[str] = frozenset({"default", "yarn"})
    """Rope types under which it reads mrope_section, by which images are rotated."""
    mrope_ramp: frozenset[str] | None = None
    """Model types whose YaRN ramp is over O where mrope_section is given; over 4 O for others. None: all over O."""
    query_growth: Literal["section", "top level", ""] = ""
    """Where it reads the factor by which queries grow with the position; empty if this was not established."""
    biases: frozenset[str] | None = frozenset()
    """Model types whose biases of queries and keys it reads, besides families released with biases; None for all."""
    lacks: frozenset[str] = frozenset()
    """Model types, known to the installed transformers, that this release does not have."""
    lacks_alone: frozenset[str] = frozenset()
    """Types of language models that it runs inside a wrapper only."""
    current_config: bool = False
    """Whether it loads the config with the config classes of transformers 5."""
    foreign: frozenset[str] = frozenset()
    """Model types that it runs and transformers lacks; `*` for any type, with code from the checkpoint."""
    overrides: bool = False
    """Whether it accepts vLLM's --hf-overrides."""
    serve: str = ""
    """The command line that serves the checkpoint in the folder EXPORT with a window of WINDOW tokens."""
    default: bool = False
    """Whether an export serves it unless the recipe names stacks."""
    read_on: str = "2026-11-22"

    def reads_biases(self, family: Family) -> bool:
        """Whether the stack is known to add biases of queries and keys in models of a family."""
        own = self.biases is None or family.model_type in self.biases | self.modelling
        return family.biased or own

    def reads_kinds(self, layout: Layout) -> bool:
        """Whether it is known to read the sections of a model; True where all layers share one."""
        return not layout.nested or self.nested or layout.model_type in self.type_only

    def loads(self, model_type: str) -> bool:
        """Whether it has this model type as that of a whole checkpoint, as far as is known."""
        return model_type not in self.lacks | self.lacks_alone

    def command(self, window: int) -> str:
        """`serve` with the window filled in; empty where no command is known."""
        return self.serve.replace("WINDOW", str(window))


def read(stack: Stack, config: dict[str, Any], modelling: Stack | None = None) -> EffectiveRope:
    """What `stack` computes from a config.json (as a dict); `modelling` is the reader of transformers' own modules.

    Raises:
        UserError: if the config is not that of a model with RoPE.
    """
    text, layout = language_model(config)
    longest = text["max_position_embeddings"]
    if not stack.loads(config.get("model_type", "")):
        reason = f"it has no {config['model_type']}"
        return EffectiveRope(longest, state="not run by this release", reason=reason)
    if layout.model_type in stack.modelling and modelling is not None:
        inner = read(modelling, text)
        return replace(inner, rows=None)
    try:
        return _read(stack, text, layout)
    except NotRun as reason:
        return EffectiveRope(longest, state="not run by this release", reason=str(reason))
    except NotEstablished as reason:
        return EffectiveRope(longest, state="not established", reason=str(reason))
    except Refused as reason:
        return EffectiveRope(longest, state="does not load", reason=str(reason))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        return EffectiveRope(longest, state="does not load", reason=f"malformed rope section: {error!r}")


def _read(stack: Stack, text: Section, layout: Layout) -> EffectiveRope:
    kind = layout.model_type
    if kind in stack.refused:
        raise Refused(stack.refused[kind])
    if kind in stack.lacks:
        raise NotRun(f"it has no {kind}")
    if not stack.reads_kinds(layout):
        raise NotEstablished("whether it reads one rope section per kind of layer was not established")
    known = stack.latent | stack.ignores_mscale
    if layout.rotated_apart and kind not in known and not stack.others_plain:
        raise NotEstablished("how it scales the logits of latent attention was not established")
    sections = stack.sections(text, layout)
    views = {kind: _view(stack, text, layout, section) for kind, section in sections.items()}
    window = stack.window(list(views.values()))
    held = [count for count in map(stack.rows, views.values()) if count is not None]
    return EffectiveRope(
        window,
        min(held) if held else None,
        {kind: _tables(stack, view, window) for kind, view in views.items()},
        softmax_gain=_softmax_gain(stack, next(iter(views.values()))),
        query_growth=_query_growth(stack, next(iter(views.values()))),
        qk_bias=stack.reads_biases(layout.family),
    )


def _view(stack: Stack, text: Section, layout: Layout, section: Section) -> View:
    top = text.get(layout.family.share_key, text.get("partial_rotary_factor", layout.partial_rotary_factor))
    partial = top if stack.top_partial else section.get("partial_rotary_factor", top)
    if layout.model_type in stack.type_only:
        section = {key: section[key] for key in ("rope_type", "rope_theta") if key in section} | {"factor": 1.0}
    return View(text, layout, section, float(1.0 if partial is None else partial))


def _softmax_gain(stack: Stack, view: View) -> float:
    """The multiplier of all logits of latent attention: the square of a YaRN gain; 1 for other models."""
    section = view.section
    factor, weight = section.get("factor"), section.get("mscale_all_dim")
    if view.layout.model_type not in stack.latent or view.rope_type == "default" or not weight or not factor:
        return 1.0
    if stack.softmax_key and section.get(stack.softmax_key, not stack.softmax_off) == stack.softmax_off:
        return 1.0
    return gain(factor, weight) ** 2


def _query_growth(stack: Stack, view: View) -> tuple[float, int] | None:
    beta, top = view.section.get("llama_4_scaling_beta"), view.config.get("llama_4_scaling")
    if (beta is None and top is None) or not view.layout.family.query_growth:
        return None
    if not stack.query_growth:
        raise NotEstablished("whether it multiplies queries by a growing factor (llama_4_scaling_beta) is not known")
    if stack.query_growth == "section":
        return None if beta is None else (float(beta), int(view.original or view.longest))
    return None if top is None else (float(top["beta"]), int(top["original_max_position_embeddings"]))


def _tables(stack: Stack, view: View, window: int) -> tuple[Table, ...]:
    kind, model_type = view.rope_type, view.layout.model_type
    if kind == "mrope" or "mrope_section" in view.section:
        if not stack.mrope:
            raise NotEstablished("whether it runs models with a position per axis of an image was not established")
        kind = "default" if kind == "mrope" else kind
        if kind not in stack.mrope_types:
            raise Refused(f"under rope_type {kind} it ignores mrope_section, and rotates images wrongly")
    own = stack.hardwired.get(model_type)
    if own is not None and own.betas == "named" and kind != "yarn":
        raise Refused(f"it builds the rope of {model_type} itself, and supports only YaRN")
    if kind == "default" or model_type in stack.unscaled:
        return (Table(default_inv_freq(view.theta, view.dim), 1.0),)
    if own is not None:
        if kind != "yarn" and not own.any_type:
            raise Refused(f"it builds the rope of {model_type} itself, and supports only YaRN")
        return own.tables(view)
    if kind == "yarn":
        return _yarn(stack, with_mrope_ramp(stack, view))
    if kind == "deepseek_yarn" and stack.deepseek is not None:
        return stack.deepseek.tables(view)
    if kind == "longrope":
        if isinstance(stack.longrope, str):
            raise Refused(stack.longrope)
        if not stack.interleaved_longrope and view.layout.interleaved:
            raise Refused("it supports longrope only if pairs are halves of the head; this model interleaves them")
        return stack.longrope.tables(view, window)
    kind = next((name for name in stack.types if name.endswith(f" {kind}")), kind)
    if kind not in stack.types:
        if kind in ("dynamic", "proportional", *stack.other_types):
            raise NotEstablished(f"how it computes rope_type {kind!r} was not established")
        raise Refused(f"it does not support rope_type {kind!r}")
    return (OTHER[kind](view),)


def with_mrope_ramp(stack: Stack, view: View) -> View:
    """The view with the original length over which the stack computes YaRN's ramp under mrope."""
    if "mrope_section" not in view.section or stack.mrope_ramp is None or view.layout.model_type in stack.mrope_ramp:
        return view
    return replace(view, section=view.section | {ORIGINAL: 4 * (view.original or view.longest)})


def _yarn(stack: Stack, view: View) -> tuple[Table, ...]:
    if view.layout.family.longrope_only:
        raise Refused("Phi-3's config class turns yarn into longrope, which needs short_factor and long_factor")
    if isinstance(stack.yarn, str):
        raise Refused(stack.yarn)
    return stack.yarn.tables(view)


def _linear(view: View) -> Table:
    return Table(linear_inv_freq(view.theta, view.dim, view.number("factor")), 1.0)


def _sglang_linear(view: View) -> Table:
    if isinstance(factor := view.section.get("factor"), int):
        raise Refused(f"it fails on a linear factor without a decimal point; write {factor}.0")
    return _linear(view)


def _sglang_dynamic(view: View) -> Table:
    """The one table that SGLang has, whatever the length of the prompt."""
    if "alpha" in view.section:
        return Table(ntk_inv_freq(view.theta, view.dim, view.number("alpha")), 1.0)
    factor = view.number("factor")
    return Table(ntk_inv_freq(view.theta, view.dim, factor * factor - (factor - 1)), 1.0)


OTHER: dict[str, Callable[[View], Table]] = {
    "linear": _linear,
    "sglang linear": _sglang_linear,
    "sglang dynamic": _sglang_dynamic,
    "llama3": llama3_table,
    "proportional": lambda view: proportional_table(view, float(view.section.get("factor") or 1.0)),
    "unscaled proportional": lambda view: proportional_table(view, 1.0),
    "dynamic": lambda view: dynamic_table(view, from_alpha=view.layout.model_type.startswith("hunyuan")),
    "vllm dynamic": vllm_dynamic_table,
}
"""Rope type -> the function that computes its table."""
