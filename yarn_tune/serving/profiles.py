"""Learned numbers -> the rope section of a stock config that every reader asked for computes alike.

Two carriers, chosen by what was learned:

`scale`, `ramp` -> `rope_type: yarn` with `truncate: false`, so that betas are not rounded to whole pairs.
    vLLM sizes its cos/sin table as original_max_position_embeddings x factor rows (0.32,
    yarn_scaling_rope.py:78), up to 0.29 it also takes that product for the window, and transformers warns
    unless max_position_embeddings / original_max_position_embeddings is the factor. YaRN's table depends on the
    original length and the betas only through their ratio, so the original length is *chosen* to satisfy all
    three at the learned factor, and the betas are multiplied by the same ratio: the frequencies stay as learned.
    The factor must then be a ratio of whole numbers near the window: `settle` moves the learned scale to the
    nearest one (a change below 1e-5 for windows of 8192 and more), and everything after training (comparison,
    export, report) uses settled numbers, so that what is measured is what is served.

`frequency` -> `rope_type: longrope` with equal lists, the one list of factors stock readers take. Which list is
    used (by length, differently in each stack) then does not matter.

The attention factor is written under the key of every reader: `attention_factor` (transformers; vLLM >= 0.30
for yarn), `attn_factor` = attention_factor / (0.1 ln s + 1) (vLLM <= 0.29), `short_mscale` and `long_mscale`
(vLLM, longrope). The section is written three times, as `rope_parameters` (transformers 5, vLLM >= 0.12), as
`rope_scaling`, and with `rope_theta` beside it (transformers 4, vLLM < 0.12): readers of one key must not fall
back to theta 10000. `original_max_position_embeddings` stands only inside the section: at top level vLLM takes
it for the window.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..rope import longrope_inv_freq, yarn_attention_factor, yarn_inv_freq
from ..tunable import Learned

EXTRA_KEYS = {"yarn": {"attn_factor"}, "longrope": {"short_mscale", "long_mscale"}}
"""Keys transformers does not know and says so: they are for vLLM."""

SLACK = 0.03
"""Share by which the window served may exceed the one asked for, to carry the learned factor more nearly."""


@dataclass(frozen=True)
class Served:
    """A rope section and the window it serves."""

    rope_parameters: dict[str, Any]
    max_position_embeddings: int

    def config_keys(self) -> dict[str, Any]:
        """What goes into config.json; see the module docstring for why it stands there three times."""
        return {
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": self.rope_parameters,
            "rope_scaling": self.rope_parameters,
            "rope_theta": self.rope_parameters["rope_theta"],
        }

    def overrides(self) -> dict[str, Any]:
        """What `vllm serve BASE --hf-overrides` needs; the section replaces the base's, so theta is in it."""
        return {
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": self.rope_parameters,
        }

    def inv_freq(self, dim: int) -> Tensor:
        """The table these keys mean, float32 `[dim / 2]`."""
        section = self.rope_parameters
        if section["rope_type"] == "longrope":
            return longrope_inv_freq(section["rope_theta"], dim, section["long_factor"])
        return yarn_inv_freq(
            section["rope_theta"],
            dim,
            section["factor"],
            section["original_max_position_embeddings"],
            section["beta_fast"],
            section["beta_slow"],
            truncate=section["truncate"],
        )


def settle(learned: Learned) -> Learned:
    """The learned numbers as a config can carry them: what is compared, exported and served from here on.

    Moves s to the nearest ratio of whole lengths near the window and expresses the betas over the original length
    of that ratio; see the module docstring. `frequency` needs nothing. Settling twice changes nothing.
    """
    if learned.factors is not None:
        return learned
    assert learned.scale is not None
    assert learned.original is not None
    assert learned.beta_fast is not None
    assert learned.beta_slow is not None
    length = round(learned.scale * learned.original)
    if length / learned.original == learned.scale and learned.window <= length <= longest(learned.window):
        return learned
    original, length = lengths_for(learned.scale, learned.native, learned.window)
    share = original / learned.original
    return replace(
        learned,
        scale=length / original,
        original=original,
        beta_fast=learned.beta_fast * share,
        beta_slow=learned.beta_slow * share,
    )


def serve(learned: Learned) -> Served:
    """The config section for settled numbers."""
    return _longrope(learned) if learned.factors is not None else _yarn(learned)


def _yarn(learned: Learned) -> Served:
    assert learned.scale is not None
    assert learned.original is not None
    section = {
        "rope_type": "yarn",
        "rope_theta": learned.facts.theta,
        "factor": learned.scale,
        "original_max_position_embeddings": learned.original,
        "beta_fast": learned.beta_fast,
        "beta_slow": learned.beta_slow,
        "truncate": False,
        "attention_factor": learned.attention_factor,
        "attn_factor": learned.attention_factor / yarn_attention_factor(learned.scale),
    }
    return Served(section | _partial(learned), round(learned.scale * learned.original))


def _longrope(learned: Learned) -> Served:
    section = {
        "rope_type": "longrope",
        "rope_theta": learned.facts.theta,
        "factor": 1.0,
        "original_max_position_embeddings": learned.window,
        "short_factor": learned.factors,
        "long_factor": learned.factors,
        "attention_factor": learned.attention_factor,
        "short_mscale": learned.attention_factor,
        "long_mscale": learned.attention_factor,
    }
    return Served(section | _partial(learned), learned.window)


def _partial(learned: Learned) -> dict[str, float]:
    share = learned.facts.partial_rotary_factor
    return {} if share == 1.0 else {"partial_rotary_factor": share}


def longest(window: int) -> int:
    """The longest window served where `window` was asked for."""
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
