"""The ways to write learned numbers into a config that stock classes read.

`selection.py` tries them in this order:

`yarn`: the factor, the betas, the original length and `truncate: false`. The attention factor a is written under two
keys, `attention_factor` = a (transformers, vLLM from 0.30) and `attn_factor` = a / (0.1 ln s + 1) (vLLM up to 0.29,
SGLang). Where the ramp ends at whole pairs (`scale`), `truncate` is omitted and the betas are moved inwards by a tiny
amount, so that readers that round the ends and readers that do not compute the same ramp.

`yarn, mscale`: a as a ratio of DeepSeek's `mscale` keys, for stacks that read those. `yarn, latent`: the same
for latent attention (DeepSeek), where `mscale_all_dim` also multiplies all logits: it is chosen such that this factor
is the one of the base.

`yarn, folded`: no key for a. Every reader applies 0.1 ln s + 1, and the rest is folded into the queries. The folded
encodings come first where weights change anyway (gains, phases, biases), since their configs are plain.

`longrope`: one factor per pair in two equal lists, so that the length at which a stack switches between them does not
matter; a is written under `attention_factor`, `short_mscale` and `long_mscale`.

`proportional`: another theta in Gemma 4's own rope type, which is all that its configs carry.

`longrope, formula`: the same with an original length for which the formula of longrope, sqrt(1 + ln(M/O) / ln O),
gives a: correct also in stacks that read no key (LMDeploy). It needs a > 1; a is moved to the nearest such value if
that is within 1e-5 of it.

`longrope, folded`: the plain lengths, original = native and M = window, with the multiplier that every reader computes
from these by the formula; the rest of a is folded into the queries. `longrope, all folded`: original = M = window and
no multiplier; all of a is folded into the queries. vLLM takes the original length of Phi-3 for the window.

Where queries grow with the position (`llama_4_scaling_beta`), O is part of that rule, so it stays the base's in every
encoding; the beta and O are also written at the top level (`llama_4_scaling`), where vLLM reads them.

Betas under yarn: where the ramp is the published one, 32 and 1 are written, and readers round its ends.

Lengths under yarn: vLLM stores cos and sin for O x s positions, up to 0.29 it also takes that product for the window,
and transformers warns unless M / O is s. The ramp depends on O only through its ratio to the betas, so O is chosen such
that O x s is just above the window, and the betas follow. Then s must be a ratio of whole numbers near the window:
`make_representable` moves the learned scale to the nearest one (by less than 1e-5 from 32768 on) before measuring.

The section is written as `rope_parameters` (transformers 5, vLLM from 0.12) and as `rope_scaling` with `rope_theta`
beside it (transformers 4, older vLLM): a stack that reads one of these keys must not fall back to theta 10000. O is
written inside the section only (vLLM takes one at the top level for the window), except for Phi-3, whose config class
requires it there.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..models import FULL, WRAPPERS, family_of, layout_of, text_section, with_text_section
from ..rope import (
    YarnRamp,
    longrope_attention_factor,
    longrope_inv_freq,
    proportional_inv_freq,
    yarn_attention_factor,
    yarn_inv_freq,
)
from ..tunable import Learned
from .rules import VLLM_KEYS, default_section

THETA_TOLERANCE = 1e-6
"""Largest relative difference between a table and that of a theta."""
SLACK = 0.03
"""Share by which the served window may exceed the requested one, to represent the learned factor more closely."""


@dataclass(frozen=True)
class RopeEncoding:
    """A rope section, the window it serves, and the part of the temperature that is folded into the weights."""

    name: str
    """One of the names in the module docstring."""
    rope_parameters: dict[str, Any]
    """The rope section of the tuned layers."""
    max_position_embeddings: int
    fold: float = 1.0
    """Factor by which the rotated rows of the queries are multiplied."""

    def folds(self, learned: Learned) -> bool:
        """Whether part of the learned numbers is in the query weights."""
        return self.fold != 1.0 or bool(learned.folds)

    def config(self, base: dict[str, Any]) -> dict[str, Any]:
        """The base's config.json with these numbers under the keys of all readers; in a wrapper, of its text config."""
        return with_text_section(base, self._text_config(text_section(base)))

    def _text_config(self, base: dict[str, Any]) -> dict[str, Any]:
        """`config` for the keys of the language model."""
        layout, section = layout_of(base), self.rope_parameters
        config = {k: v for k, v in base.items() if k not in ("rope_scaling", "rope_parameters")}
        if config.get("head_dim", 0) is None:
            # Readers that find null under this key do not fall back to hidden_size / heads.
            config["head_dim"] = layout.head_dim
        config["max_position_embeddings"] = self.max_position_embeddings
        config |= dict.fromkeys(_other_window_keys(base), self.max_position_embeddings)
        if layout.family.theta_only:
            config["rope_parameters"] = (base.get("rope_parameters") or {}) | {FULL: section}
            for kind in layout.kinds:
                config["rope_parameters"].setdefault(kind, default_section(base, layout.thetas[kind], kind))
            return config
        nested = {FULL: section} | {k: default_section(base, layout.thetas[k], k) for k in layout.kinds if k != FULL}
        config["rope_parameters"] = nested if layout.nested else section
        config["rope_scaling"] = section
        config["rope_theta"] = section["rope_theta"]
        if layout.family.local_theta_key:
            config[layout.family.local_theta_key] = nested["sliding_attention"]["rope_theta"]
        share = section.get("partial_rotary_factor")
        if share is not None:
            config["partial_rotary_factor"] = share
        own = {layout.family.share_key: share or 1.0, layout.family.theta_key: section["rope_theta"]}
        config |= {key: value for key, value in own.items() if key not in ("partial_rotary_factor", "rope_theta")}
        if "llama_4_scaling_beta" in section:
            original = "original_max_position_embeddings"
            config["llama_4_scaling"] = {original: section[original], "beta": section["llama_4_scaling_beta"]}
        if layout.original is not None:
            config["original_max_position_embeddings"] = section["original_max_position_embeddings"]
        return config

    def overrides(self, base: dict[str, Any]) -> dict[str, Any]:
        """The value of `vllm serve BASE --hf-overrides`; each key replaces the one of the base, so theta is included.

        Raises:
            UserError: if part of the temperature is in the weights, which the base does not have.
        """
        if self.fold != 1.0:
            raise UserError("export.fold: part of the temperature is folded into the weights, so overrides of the "
                            "base's config cannot carry it; use --fold never, or export a checkpoint")  # fmt: skip
        text = text_section(base)
        config = self._text_config(text)
        keys = ["max_position_embeddings", "rope_parameters", *_other_window_keys(text)]
        keys += ["original_max_position_embeddings", "llama_4_scaling"]
        changes = {k: config[k] for k in keys if k in config}
        return changes if text is base else {WRAPPERS[base["model_type"]].key: changes}

    def inv_freq(self, dim: int) -> Tensor:
        """The inverse frequencies that these keys define, float32 `[dim / 2]`."""
        section = self.rope_parameters
        if section["rope_type"] == "proportional":
            return proportional_inv_freq(section["rope_theta"], dim, round(dim / section["partial_rotary_factor"]))
        if section["rope_type"] == "longrope":
            return longrope_inv_freq(section["rope_theta"], dim, section["long_factor"])
        original, betas = section["original_max_position_embeddings"], (section["beta_fast"], section["beta_slow"])
        ramp = YarnRamp(original, *betas, truncate=section.get("truncate", True))
        return yarn_inv_freq(section["rope_theta"], dim, section["factor"], ramp)


def _other_window_keys(base: dict[str, Any]) -> list[str]:
    """Keys of the base from which servers take a window of their own, shorter than the new one."""
    return [key for key in VLLM_KEYS if key != "max_position_embeddings" and base.get(key) is not None]


def yarn_encodings(numbers: Learned, folded: bool) -> Iterator[RopeEncoding]:
    """The encodings as YaRN, with the attention factor in the config or folded into the queries."""
    scale, a = numbers.scale, numbers.attention_factor
    assert scale is not None
    assert numbers.original is not None
    own, longest = yarn_attention_factor(scale), round(scale * numbers.original)
    section = {
        "rope_type": "yarn",
        "rope_theta": numbers.facts.theta,
        "factor": scale,
        "original_max_position_embeddings": numbers.original,
        "beta_fast": numbers.beta_fast,
        "beta_slow": numbers.beta_slow,
        **({} if numbers.truncate else {"truncate": False}),
        **_from_base(numbers),
    }
    if family_of(numbers.facts.model_type).latent:
        if not folded:
            yield RopeEncoding("yarn, latent", section | _latent_keys(numbers, scale, a), longest)
        return
    if folded:
        yield RopeEncoding("yarn, folded", section, longest, _fold(a, own))
        return
    yield RopeEncoding("yarn", section | {"attention_factor": a, "attn_factor": a / own}, longest)
    weight = (a * own - 1) / (own - 1) if own > 1 else 0.0
    if weight > 0:
        keys = {"attention_factor": a, "mscale": weight, "mscale_all_dim": 1.0}
        yield RopeEncoding("yarn, mscale", section | keys, longest)


def _latent_keys(numbers: Learned, scale: float, a: float) -> dict[str, float]:
    """DeepSeek's keys: the attention factor is a ratio of two gains; the second scales all logits, as in the base."""
    if scale <= 1:
        return {"attention_factor": a}  # without extension the gain is 1 for any mscale
    growth = 0.1 * math.log(scale)
    everywhere = math.sqrt(numbers.facts.softmax_gain)
    keys = {"attention_factor": a, "mscale": (a * everywhere - 1) / growth}
    if everywhere == 1:
        return keys
    if a == 1.0:
        # vLLM switches the multiplier of all logits off where the config states exactly 1. Without the key, the ratio
        # of the two weights gives 1.
        del keys["attention_factor"]
    return keys | {"mscale_all_dim": (everywhere - 1) / growth}


def theta_encodings(numbers: Learned, folded: bool) -> Iterator[RopeEncoding]:
    """The encoding as another theta under the base's own rope_type (proportional), for tables that are one of a theta.

    Pairs beyond the rotated share have frequency 0, and no key for a multiplier is read.
    """
    facts, factors = numbers.facts, numbers.factors
    if factors is None or folded or numbers.attention_factor != 1.0:
        return
    wanted = longrope_inv_freq(facts.theta, facts.dim, factors)
    if (numbers.inv_freq() / wanted - 1).abs().max().item() < THETA_TOLERANCE:
        share = facts.partial_rotary_factor
        section = {"rope_type": "proportional", "partial_rotary_factor": share, "rope_theta": numbers.config_theta}
        yield RopeEncoding("proportional", section, numbers.window)


def longrope_encodings(numbers: Learned, folded: bool) -> Iterator[RopeEncoding]:
    """The encodings as longrope, with the attention factor in the config or folded into the queries."""
    a, window = numbers.attention_factor, numbers.window

    def section(original: int, length: int, multiplier: float) -> dict[str, Any]:
        return {
            "rope_type": "longrope",
            "rope_theta": numbers.facts.theta,
            "factor": length / original,
            "original_max_position_embeddings": original,
            "short_factor": numbers.factors,
            "long_factor": numbers.factors,
            "attention_factor": multiplier,
            "short_mscale": multiplier,
            "long_mscale": multiplier,
            **_from_base(numbers),
        }

    growth = numbers.facts.query_growth
    fixed = growth[1] if growth else window
    if folded:
        if not growth:
            own = longrope_attention_factor(window / numbers.native, numbers.native)
            yield RopeEncoding("longrope, folded", section(numbers.native, window, own), window, _fold(a, own))
        yield RopeEncoding("longrope, all folded", section(fixed, window, 1.0), window, a * a)
        return
    yield RopeEncoding("longrope", section(fixed, window, a), window)
    if a > 1 and not growth:
        original, length = lengths_of_formula(a, window)
        yield RopeEncoding("longrope, formula", section(original, length, a), length)


def _fold(wanted: float, own: float) -> float:
    """The factor on queries that turns the multiplier of cos and sin `own` into `wanted`; 1 if they are equal."""
    return 1.0 if math.isclose(wanted, own, rel_tol=1e-12) else (wanted / own) ** 2


def _from_base(numbers: Learned) -> dict[str, Any]:
    """Keys of the section that are the base's: the rotated share, `RopeFacts.kept`, and beta where queries grow."""
    facts = numbers.facts
    share = {} if facts.partial_rotary_factor == 1.0 else {"partial_rotary_factor": facts.partial_rotary_factor}
    growth = {} if facts.query_growth is None else {"llama_4_scaling_beta": facts.query_growth[0]}
    return share | growth | dict(facts.kept)


@lru_cache
def lengths_of_formula(a: float, window: int) -> tuple[int, int]:
    """(O, M) at which sqrt(1 + ln(M/O) / ln O) is `a` as nearly as whole numbers allow; M is at least `window`."""

    def original(length: int) -> int:
        return max(2, round(math.exp(math.log(length) / a**2)))

    def error(length: int) -> float:
        return abs(longrope_attention_factor(length / original(length), original(length)) / a - 1)

    best = min(range(window, longest(window) + 1), key=error)
    return original(best), best


def longest(window: int) -> int:
    """The longest window that is served for a requested `window`."""
    return math.ceil(window * (1 + SLACK)) + 64


def lengths_for(scale: float, native: int, window: int) -> tuple[int, int]:
    """(original, served) lengths whose ratio is `scale` as nearly as whole numbers allow.

    The served length is at least `window`, also as the float product original x (served / original), and at
    most a little longer (`longest`). The native window itself is taken if it gives the ratio to float32 precision.
    """

    def served(original: int) -> int:
        length = max(window, round(original * scale))
        return length if original * (length / original) >= window else length + 1

    def error(original: int) -> float:
        return abs(served(original) / original / scale - 1)

    least = math.ceil(window / scale)
    most = max(least, math.floor(longest(window) / scale))
    if least <= native <= most and error(native) < 1e-7:
        return native, served(native)
    best = min(range(least, most + 1), key=lambda original: (max(error(original), 1e-7), original))
    return best, served(best)
