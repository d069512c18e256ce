"""Choice of the encoding that every requested stack reads correctly, or an error that names what would be lost.

The readers of these stacks (`stacks.py`) are applied to each encoding (`encodings.py`) in turn; the first encoding from
which all of them compute the learned numbers is used.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import CheckFailed, UserError
from ..models import UNQUANTISED, BaseModel, Layout, as_twin, language_model, quantisation_of, query_site
from ..recipe import Export, Lora, Rope
from ..rope import (
    BETA_FAST,
    BETA_SLOW,
    correction_range,
    default_inv_freq,
    longrope_attention_factor,
    snapped_betas,
)
from ..tunable import KINDS, GainFold, Learned, TunableRotary, check_biased, config_changes
from .conformance import expected_rope, mismatches
from .encodings import (
    RopeEncoding,
    lengths_for,
    lengths_of_formula,
    longest,
    longrope_encodings,
    theta_encodings,
    yarn_encodings,
)
from .readers import Stack
from .stacks import STACKS, default_stacks, reading

TABLE_TOLERANCE = 1e-6
"""Largest relative difference between the trained and the representable table: a few roundings to float32."""


SETTLED_A = 1e-5
"""Relative amount by which the attention factor may be moved to what the formula of longrope gives."""


@dataclass(frozen=True)
class Target:
    """The stacks that must serve the learned numbers, and the base they are learned on."""

    base: dict[str, Any]
    """config.json of the base."""
    stacks: tuple[str, ...]
    fold: str = "auto"
    """auto: fold into the weights only if the stacks need it; never: do not fold; always: fold the temperature."""
    left_out: dict[str, str] | None = None
    """Default stacks that cannot serve this family, with the reason."""

    @classmethod
    def of(
        cls, base: dict[str, Any], stacks: Sequence[str] | None = None, fold: str = "auto", qk_bias: bool = False
    ) -> "Target":
        """The named stacks, or the default ones that run this family's scaling and, if learned, read its biases."""
        if stacks is not None:
            return cls(base, tuple(stacks), fold)
        left_out = {}
        for name in default_stacks():
            text, layout = language_model(base)
            reason = left_out_reason(STACKS[name], text, layout)
            if not STACKS[name].loads(base.get("model_type", "")):
                reason = f"has no {base['model_type']} in these releases"
            if qk_bias and not STACKS[name].reads_biases(layout.family):
                reason = reason or f"is not known to read biases of queries and keys in {layout.model_type}"
            if reason:
                left_out[name] = reason
        return cls(base, tuple(n for n in default_stacks() if n not in left_out), fold, left_out)

    @classmethod
    def of_model(cls, base: BaseModel, export: Export, rope: Rope) -> "Target":
        """`of` for a base model and the `export` section of a recipe; reads the base's config, no weights.

        Raises:
            UserError: if the base is to be written as a Llama and does not compute what one computes.
        """
        written = as_twin(base.written) if export.as_llama else base.written
        return cls.of(written, export.stacks, export.fold, rope.qk_bias)


def left_out_reason(stack: Stack, text: dict[str, Any], layout: Layout) -> str:
    """Why a stack cannot be expected to serve a tuned model with this config and layout; empty where it can."""
    kind = layout.model_type
    if kind in stack.lacks:
        return f"has no {kind} in these releases"
    section = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if "mrope_section" in section and not stack.mrope:
        return "may not rotate images by a position per axis (mrope_section): this was not established"
    if "mrope_section" in section and stack.mrope_ramp is not None and kind not in stack.mrope_ramp:
        return "computes YaRN's ramp over 4 times the original length where positions have axes (mrope_section)"
    if layout.rotated_apart and kind in stack.ignores_mscale and section.get("mscale_all_dim"):
        return "ignores mscale_all_dim, by which others multiply the logits of latent attention"
    known = stack.latent | stack.ignores_mscale
    if layout.rotated_apart and kind not in known and not stack.others_plain:
        return "may scale the logits of latent attention in another way: this was not established"
    if layout.family.query_growth and not stack.query_growth:
        return "may not multiply queries by a factor that grows with the position (llama_4_scaling_beta)"
    if kind in stack.unscaled:
        return f"runs {kind} without any RoPE scaling"
    if layout.family.theta_only and not any(kind.endswith("proportional") for kind in stack.types):
        return "is not known to read rope_type proportional"
    if not stack.reads_kinds(layout):
        return "may not read one rope section per kind of layer"
    return ""


def make_representable(learned: Learned, target: Target) -> Learned:
    """The learned numbers in a form that a config can represent; comparison, export and serving use these.

    Applying it twice changes nothing.

    Raises:
        UserError: if no encoding serves all stacks of the target; the message names each stack and what it would lose.
    """
    if learned.folds and target.fold == "never":
        kind = KINDS[learned.folds[0].kind]
        raise UserError(
            f"export.fold: never, but {kind.label} ({kind.key}) can only be folded into the weights; allow folding "
            f"(export.fold: auto), or learn without {kind.key}"
        )
    if any(fold.kind == "bias" for fold in learned.folds):
        check_biased(target.base)
    method = quantisation_of(target.base)
    if method and (learned.lora or [f for f in learned.folds if not (isinstance(f, GainFold) and f.site.normed)]):
        key = KINDS[learned.folds[0].kind].key if learned.folds else "lora"
        raise UserError(_quantised(key, method))
    for folded in _foldings(learned, target):
        for numbers in forms(learned):
            if _first(numbers, target, folded) is not None:
                return numbers
    raise UserError(_refusal(learned, target))


def representable_parameters(rotary: TunableRotary, target: Target) -> Learned:
    """`make_representable` for the numbers of a trained module, compared with its table.

    Raises:
        CheckFailed: if the representable table differs from the trained one.
    """
    learned = make_representable(rotary.learned(), target)
    trained = rotary.table()[0].detach().cpu()
    error = (learned.inv_freq() / trained - 1).abs().max().item()
    if not error <= TABLE_TOLERANCE:
        raise CheckFailed(f"the frequencies to be served differ from the trained ones by {error:.1e} (relative)")
    return learned


def choose_encoding(learned: Learned, target: Target) -> RopeEncoding:
    """The encoding of representable numbers; raises as `make_representable` does."""
    for folded in _foldings(learned, target):
        served = _first(learned, target, folded)
        if served is not None:
            return served
    raise UserError(_refusal(learned, target))


def _foldings(learned: Learned, target: Target) -> tuple[bool, bool]:
    """The order in which the temperature is tried in the weights (True) and in the config (False).

    In the weights first where these change anyway, since the config is then plain: the native window, the served one,
    their ratio, and the attention factor that every reader computes from these.
    """
    return (True, False) if learned.folds and target.fold == "auto" else (False, True)


def _first(numbers: Learned, target: Target, folded: bool) -> RopeEncoding | None:
    encodings = _encodings(numbers, target, folded)
    return next((served for served in encodings if not unserved(served, numbers, target)), None)


def forms(learned: Learned) -> Iterator[Learned]:
    """The learned numbers in the forms that a config can represent, in order of preference."""
    growth = learned.facts.query_growth
    if learned.factors is None:
        native = growth[1] if growth else learned.facts.ramp.original if learned.facts.ramp else learned.native
        assert learned.scale is not None
        assert learned.original is not None
        length = round(learned.scale * learned.original)
        settled = length / learned.original == learned.scale
        if settled and learned.window <= length <= longest(learned.window) and not growth:
            yield from _ramps(learned)
        elif not growth:
            yield from _ramps(_over(learned, *lengths_for(learned.scale, native, learned.window)))
        length = round(learned.scale * native)
        if length >= learned.window:
            # A longer window than requested, over the native length, for stacks with fixed betas (TGI, llama.cpp).
            yield from _ramps(_over(learned, native, length))
    base = default_inv_freq(learned.facts.theta, learned.facts.dim)
    factors = learned.factors or (base.double() / learned.inv_freq().double()).tolist()
    listed = replace(learned, scale=None, original=None, beta_fast=None, beta_slow=None, factors=factors)
    yield listed
    if learned.attention_factor > 1 and not growth:
        original, length = lengths_of_formula(learned.attention_factor, learned.window)
        settled_a = longrope_attention_factor(length / original, original)
        if abs(settled_a / learned.attention_factor - 1) < SETTLED_A:
            yield replace(listed, temperature=1 / settled_a**2)


def _over(learned: Learned, original: int, length: int) -> Learned:
    """The learned numbers with the same ramp, written over another original length."""
    assert learned.original is not None
    assert learned.beta_fast is not None
    assert learned.beta_slow is not None
    share = original / learned.original
    return replace(
        learned,
        scale=length / original,
        original=original,
        beta_fast=learned.beta_fast * share,
        beta_slow=learned.beta_slow * share,
        truncate=False,
    )


def _ramps(learned: Learned) -> Iterator[Learned]:
    """The learned ramp with the published betas, if it is the published one, and with betas for all readers."""
    assert learned.original is not None
    assert learned.beta_fast is not None
    assert learned.beta_slow is not None
    theta, dim, original = learned.facts.theta, learned.facts.dim, learned.original
    own = correction_range(theta, dim, original, learned.beta_fast, learned.beta_slow, learned.truncate)
    published = correction_range(theta, dim, original, BETA_FAST, BETA_SLOW, truncate=True)
    if all(abs(one.item() - other.item()) < 1e-7 for one, other in zip(own, published, strict=True)):
        learned = replace(learned, beta_fast=BETA_FAST, beta_slow=BETA_SLOW, truncate=True)
        yield learned
        # Readers that do not round the ends need other betas for the same ramp.
        fast, slow = snapped_betas(theta, dim, original)
        learned = replace(learned, beta_fast=fast, beta_slow=slow, truncate=False)
    yield _whole_pairs(learned)


def _whole_pairs(learned: Learned) -> Learned:
    """Betas with which readers that round the ends of the ramp and readers that do not compute the same ramp.

    Possible where the ramp ends at whole pairs; other numbers are returned unchanged.
    """
    assert learned.original is not None
    assert learned.beta_fast is not None
    assert learned.beta_slow is not None
    theta, dim, original = learned.facts.theta, learned.facts.dim, learned.original
    ends = correction_range(theta, dim, original, learned.beta_fast, learned.beta_slow, truncate=False)
    low, high = (end.item() for end in ends)
    whole = abs(low - round(low)) < 1e-5 and abs(high - round(high)) < 1e-5
    if learned.truncate or not whole or not 0 <= round(low) < round(high) < dim - 1:
        return learned
    # Readers clamp the first end at pair 0, where nothing is left of it to round.
    inwards = (round(low) + 1e-6 if round(low) else -0.5, round(high) - 1e-6)
    fast, slow = (original / (2 * math.pi * theta ** (2 * end / dim)) for end in inwards)
    return replace(learned, beta_fast=fast, beta_slow=slow, truncate=True)


def unserved(served: RopeEncoding, numbers: Learned, target: Target) -> dict[str, list[str]]:
    """Stack -> what it would lose under this encoding; empty if all serve it."""
    config = served.config(target.base | config_changes(numbers.folds))
    wanted = expected_rope(numbers, target.base, served.fold)
    found = {name: mismatches(reading(name, config), wanted) for name in target.stacks}
    return {name: problems for name, problems in found.items() if problems}


def _refusal(learned: Learned, target: Target) -> str:
    """The error message: what each stack loses under the encoding that most stacks load and read, and the remedy."""
    tried = []
    for numbers in forms(learned):
        for folded in (False, True):
            tried += [(s.name, unserved(s, numbers, target)) for s in _encodings(numbers, target, folded)]
    if not tried:
        return "export.fold: always, but this family cannot be folded: " + (_unfoldable(target) or "")
    encoding, lost = min(tried, key=lambda item: (_unloadable(item[1]), len(item[1])))
    lines = [f"  {name}: {'; '.join(problems)}" for name, problems in lost.items()]
    allow = "" if target.fold != "never" else ", allow folding into the weights (export.fold: auto)"
    return "\n".join(
        [
            f"export.stacks: no config serves what is learned on all of {', '.join(target.stacks)}. "
            f"With the best one ({encoding}):",
            *lines,
            f"Leave these stacks out of export.stacks{allow}, or learn numbers that they can read "
            "(rope.frequencies: scale is supported by most stacks).",
        ]
    )


def _unloadable(lost: dict[str, list[str]]) -> int:
    """On how many stacks the checkpoint would not load."""
    return sum(any(problem.startswith("does not load") for problem in problems) for problems in lost.values())


def check_mergeable(base: dict[str, Any], lora: Lora | None) -> None:
    """Check that LoRA can be merged into the base's weights; raises `UserError` if they are quantised."""
    method = quantisation_of(base)
    if lora is not None and method:
        raise UserError(_quantised("lora", method))


def _quantised(key: str, method: str) -> str:
    return (
        f"{key}: it changes weights, and those of a quantised base ({method}) are left as they are; "
        f"{UNQUANTISED}. Numbers that stay in config.json (rope.frequencies with rope.query_gains: none) can be "
        "learned on it"
    )


def _unfoldable(target: Target) -> str | None:
    """Why this family cannot be folded, if so."""
    try:
        site = query_site(target.base)
    except UserError as error:
        return str(error)
    method = quantisation_of(target.base)
    return _quantised("export.fold", method) if method and not site.normed else None


def _encodings(numbers: Learned, target: Target, folded: bool) -> Iterator[RopeEncoding]:
    """Encodings of representable numbers, with the temperature in the config or in the weights."""
    make = yarn_encodings if numbers.factors is None else longrope_encodings
    make = theta_encodings if numbers.facts.theta_only else make
    allowed = _unfoldable(target) is None and target.fold != "never" if folded else target.fold != "always"
    return make(numbers, folded) if allowed else iter(())
