"""Which carrier serves the learned numbers on every stack asked for, or a refusal that says what would be lost.

The readers of all those stacks (`stacks.py`) are run on every carrier (`carriers.py`) in turn, and the first that
all of them read as what was learned is taken.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import CheckFailed, UserError
from ..models import FULL, BaseModel, layout_of, query_site
from ..recipe import Export
from ..rope import default_inv_freq
from ..tunable import Learned, TunableRotary
from .encodings import RopeEncoding, default_section, forms, longrope_carriers, yarn_carriers
from .readers import EffectiveRope, Table
from .stacks import DEFAULT, STACKS, reading

FREQUENCY_TOLERANCE, MULTIPLIER_TOLERANCE = 1e-5, 1e-6
"""How nearly a stack must compute what was learned, relative."""

TABLE_TOLERANCE = 1e-6
"""Between the table as trained and as settled, relative: a few roundings to float32."""


@dataclass(frozen=True)
class Target:
    """What the numbers are to be served on."""

    base: dict[str, Any]
    """config.json of the base."""
    stacks: tuple[str, ...]
    fold: str = "auto"
    """auto: leave the weights as they are if the stacks allow it. never. always."""
    left_out: dict[str, str] | None = None
    """Default stacks that cannot serve this family, with the reason."""

    @classmethod
    def of(cls, base: dict[str, Any], stacks: Sequence[str] | None = None, fold: str = "auto") -> "Target":
        """The stacks asked for, or the default ones that run this family's scaling at all."""
        if stacks is not None:
            return cls(base, tuple(stacks), fold)
        layout, left_out = layout_of(base), {}
        for name in DEFAULT:
            stack = STACKS[name]
            if layout.family.latent and not stack.latent:
                left_out[name] = "how it scales the logits of latent attention was not established"
            elif layout.model_type in stack.unscaled:
                left_out[name] = f"runs {layout.model_type} without any RoPE scaling"
            elif layout.nested and not stack.nested:
                left_out[name] = "may not read one rope section a kind of layer"
        return cls(base, tuple(n for n in DEFAULT if n not in left_out), fold, left_out)

    @classmethod
    def of_model(cls, base: BaseModel, export: Export) -> "Target":
        """`of` for a base model and the `export` section of a recipe; reads the base's config, no weights."""
        return cls.of(base.written, export.stacks, export.fold)


def make_representable(learned: Learned, target: Target) -> Learned:
    """The learned numbers as a config can carry them: what is compared, exported and served from here on.

    Settling twice changes nothing.

    Raises:
        UserError: if no carrier serves all stacks of the target, naming each and what it would lose.
    """
    if learned.gains is not None and target.fold == "never":
        raise UserError("export.fold: never, but gains by layer, head or pair can only be folded into the queries; "
                        "set rope.query_gains: none, or allow folding")  # fmt: skip
    for folded in (False, True):
        for numbers in forms(learned):
            if _first(numbers, target, folded) is not None:
                return numbers
    raise UserError(_refusal(learned, target))


def representable_parameters(rotary: TunableRotary, target: Target) -> Learned:
    """`settle` for the numbers of a trained module, held against its table.

    Raises:
        CheckFailed: if the settled table is not the trained one.
    """
    learned = make_representable(rotary.learned(), target)
    trained = rotary.table()[0].detach().cpu()
    error = (learned.inv_freq() / trained - 1).abs().max().item()
    if not error <= TABLE_TOLERANCE:
        raise CheckFailed(f"the frequencies to be served differ from the trained ones by {error:.1e} (relative)")
    return learned


def choose_encoding(learned: Learned, target: Target) -> RopeEncoding:
    """The carrier of settled numbers; raises as `settle` does."""
    served = _first(learned, target, False) or _first(learned, target, True)
    if served is None:
        raise UserError(_refusal(learned, target))
    return served


@dataclass(frozen=True)
class ExpectedRope:
    """What a stack must compute."""

    tables: dict[str, list[tuple[Tensor, float]]]
    """By kind of layer: frequencies and multiplier of cos and sin (the fold included), for short prompts and, where
    that differs, for long ones."""
    window: int
    softmax_gain: float = 1.0
    """What latent attention multiplies all its logits by: as the base does."""
    fold: float = 1.0
    """What the weights of the tuned layers multiply logits by, on top of the stack's own multiplier."""

    def pairs(self, kind: str, found: tuple[Table, ...]) -> list[tuple[Table, tuple[Tensor, float]]]:
        """Each of a stack's tables beside the one wanted for prompts of that length."""
        wanted = self.tables[kind]
        if len(found) == 1:
            return [(found[0], one) for one in wanted]
        return list(zip(found, [wanted[0], wanted[-1]], strict=True))


def mismatches(found: EffectiveRope, wanted: ExpectedRope) -> list[str]:
    """How a reading differs from what is wanted; empty if it serves exactly that."""
    if found.refusal is not None:
        return [f"does not load it: {found.refusal}"]
    problems = []
    for kind in wanted.tables:
        own_fold = wanted.fold if kind in ("", FULL) else 1.0
        for table, (inv_freq, multiplier) in wanted.pairs(kind, found.tables[kind]):
            where = f" in {kind} layers" if kind else ""
            where += f" beyond {table.above} tokens" if table.above else ""
            error = frequency_error(table.inv_freq, inv_freq)
            if error > FREQUENCY_TOLERANCE:
                problems.append(f"frequencies off by {error:.1e} (relative){where}")
            total = table.multiplier * math.sqrt(own_fold)
            if abs(total / multiplier - 1) > MULTIPLIER_TOLERANCE:
                problems.append(f"multiplies cos and sin by {total:.6g} instead of {multiplier:.6g}{where}")
    if abs(found.softmax_gain / wanted.softmax_gain - 1) > MULTIPLIER_TOLERANCE:
        problems.append(f"multiplies all logits by {found.softmax_gain:.6g} instead of {wanted.softmax_gain:.6g}")
    if found.window < wanted.window:
        problems.append(f"takes prompts of at most {found.window} tokens instead of {wanted.window}")
    if found.rows is not None and found.rows < found.window:
        problems.append(
            f"holds cos and sin for {found.rows} positions but takes prompts of {found.window}: NaN beyond them"
        )
    return list(dict.fromkeys(problems))


def frequency_error(found: Tensor, wanted: Tensor) -> float:
    """Largest relative difference; infinite where the numbers of pairs differ."""
    if found.shape != wanted.shape:
        return math.inf
    return (found.double() / wanted.double() - 1).abs().max().item()


def wanted_of(learned: Learned, base: dict[str, Any], fold: float = 1.0) -> ExpectedRope:
    """What every stack must compute for these numbers."""
    layout = layout_of(base)
    tuned = (learned.inv_freq(), learned.attention_factor)
    if not layout.nested:
        return ExpectedRope({"": [tuned]}, learned.window, learned.facts.softmax_gain, fold)
    sections = {k: default_section(base, layout.thetas[k], k) for k in layout.kinds if k != FULL}
    others = {k: [(default_inv_freq(s["rope_theta"], learned.facts.dim), 1.0)] for k, s in sections.items()}
    return ExpectedRope({FULL: [tuned]} | others, learned.window, fold=fold)


def _first(numbers: Learned, target: Target, folded: bool) -> RopeEncoding | None:
    carriers = _carriers(numbers, target, folded)
    return next((served for served in carriers if not unserved(served, numbers, target)), None)


def unserved(served: RopeEncoding, numbers: Learned, target: Target) -> dict[str, list[str]]:
    """Stack -> what it would lose under this carrier; empty if all serve it."""
    config, wanted = served.config(target.base), wanted_of(numbers, target.base, served.fold)
    found = {name: mismatches(reading(name, config), wanted) for name in target.stacks}
    return {name: problems for name, problems in found.items() if problems}


def _refusal(learned: Learned, target: Target) -> str:
    """Which stack loses what, under the carrier that serves most of them, and what to do."""
    tried = []
    for numbers in forms(learned):
        for folded in (False, True):
            tried += [(s.carrier, unserved(s, numbers, target)) for s in _carriers(numbers, target, folded)]
    if not tried:
        return "export.fold: always, but this family cannot be folded: " + (_unfoldable(target) or "")
    carrier, lost = min(tried, key=lambda item: len(item[1]))
    lines = [f"  {name}: {'; '.join(problems)}" for name, problems in lost.items()]
    allow = "" if target.fold != "never" else ", allow folding into the weights (export.fold: auto)"
    return "\n".join(
        [
            f"export.stacks: no config serves what is learned on all of {', '.join(target.stacks)}. "
            f"With the best one ({carrier}):",
            *lines,
            f"Leave these stacks out of export.stacks{allow}, or learn something they can carry "
            "(rope.frequencies: scale needs least).",
        ]
    )


def _unfoldable(target: Target) -> str | None:
    """Why this family cannot be folded, if so."""
    try:
        query_site(target.base)
    except UserError as error:
        return str(error)
    return None


def _carriers(numbers: Learned, target: Target, folded: bool) -> Iterator[RopeEncoding]:
    """Ways to write settled numbers down, with the temperature in the config or in the weights."""
    make = yarn_carriers if numbers.factors is None else longrope_carriers
    allowed = _unfoldable(target) is None and target.fold != "never" if folded else target.fold != "always"
    return make(numbers, folded) if allowed else iter(())
