"""What is learned, in natural units, and where learning starts."""

import math
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..models import RopeFacts
from ..recipe import Rope
from ..rope import Scalar, default_inv_freq, longrope_inv_freq, snapped_betas, yarn_attention_factor, yarn_inv_freq
from .lora import Factors


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Learned numbers in natural units, enough to rebuild the table: what the export serves.

    The table is `factors`, where given; else YaRN's over a window of `original` tokens, of which only the ratio to
    the betas matters.
    """

    frequencies: str
    facts: RopeFacts
    native: int
    window: int
    temperature: float
    scale: float | None = None
    original: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool = False
    """Whether the ramp's ends are rounded outwards, as published."""
    factors: list[float] | None = None
    gains: Tensor | None = None
    """What queries are multiplied by, `[tuned layers, groups, d/2]` in double precision; see `gains.py`."""
    lora: Factors | None = None
    """Changes of the weights, merged before anything is folded; see `lora.py`."""

    @property
    def attention_factor(self) -> float:
        """What multiplies cos and sin."""
        return 1.0 / math.sqrt(self.temperature)

    def inv_freq(self) -> Tensor:
        """The table as a stock model computes it from these numbers, float32 `[d/2]`."""
        theta, dim = self.facts.theta, self.facts.dim
        if self.factors is not None:
            return longrope_inv_freq(theta, dim, self.factors)
        assert self.scale is not None
        assert self.original is not None
        assert self.beta_fast is not None
        assert self.beta_slow is not None
        betas = self.beta_fast, self.beta_slow
        return yarn_inv_freq(theta, dim, self.scale, self.original, *betas, truncate=self.truncate)

    def summary(self) -> dict[str, float]:
        """A few numbers for a progress line."""
        shown = {"temperature": self.temperature}
        if self.scale is not None:
            shown["scale"] = self.scale
        if self.frequencies == "ramp":
            shown |= {"beta_fast": self.beta_fast or 0.0, "beta_slow": self.beta_slow or 0.0}
        if self.factors is not None:
            shown |= {"slowest_factor": self.factors[-1], "largest_factor": max(self.factors)}
        if self.gains is not None:
            shown |= {"smallest_gain": self.gains.abs().min().item(), "largest_gain": self.gains.abs().max().item()}
        return shown

    def as_json(self) -> dict[str, Any]:
        """Everything but the base's facts and the gains, of which there may be many: those are in the weights."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("facts", "gains", "lora")}
        gains = None if self.gains is None else {"shape": list(self.gains.shape), "complex": self.gains.is_complex()}
        return named | {"gains": gains, "lora": sorted(self.lora or ())}


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where learning starts: search-free YaRN for this base and window.

    Over a base that ships YaRN, that is the base's own with a larger factor; over one scaled otherwise, YaRN laid over
    the base's table. Nothing to extend (window = native) is the base itself.
    """

    facts: RopeFacts
    native: int
    """Window of the untouched base."""
    window: int
    factor: float
    """YaRN's, over a window of `original` tokens."""
    original: int
    """Window that the betas count turns in: the native one, or that of the YaRN the base ships."""
    beta_fast: float
    beta_slow: float
    truncate: bool = True

    @classmethod
    def of(cls, facts: RopeFacts, rope: Rope) -> "Start":
        """Fill the recipe's nulls from the base model.

        Raises:
            UserError: if the window is smaller than the native one or than the base can look back, or the betas are
                not those of the YaRN that the base ships.
        """
        native = rope.native or facts.native
        if rope.window < native:
            raise UserError(
                f"rope.window: {rope.window} is smaller than the base model's native window {native}; "
                "this tool only extends (rope.native overrides what the config says)"
            )
        if facts.sees is not None and rope.window > facts.sees:
            raise UserError(
                f"rope.window: {rope.window}, but layers of this base look back {facts.sees} tokens at most (sliding "
                "window), which no change of RoPE extends"
            )
        ramp = facts.ramp
        original = ramp.original if ramp else native
        own = (ramp.beta_fast, ramp.beta_slow) if ramp else (rope.beta_fast, rope.beta_slow)
        if (rope.beta_fast, rope.beta_slow) not in (own, (Rope.beta_fast, Rope.beta_slow)):
            raise UserError(
                f"rope.beta_fast, rope.beta_slow: {rope.beta_fast:g} and {rope.beta_slow:g}, but the base ships YaRN "
                f"with {own[0]:g} and {own[1]:g}, which is continued; leave them out (rope.frequencies: ramp "
                "learns them)"
            )
        # The least a base's own YaRN does is what it does: a window of the base's needs no larger factor.
        least = ramp.factor if ramp else 0.0
        return cls(
            facts=facts,
            native=native,
            window=rope.window,
            factor=rope.factor or max(least, rope.window / original),
            original=original,
            beta_fast=own[0],
            beta_slow=own[1],
            truncate=ramp.truncate if ramp else True,
        )

    @property
    def laid_over(self) -> Tensor | None:
        """The base's own table, where the start is not YaRN from scratch, `[d/2]`."""
        scaling = self.facts.scaling
        return None if scaling is None or scaling.ramp else scaling.table(self.window)[0]

    @property
    def stretch(self) -> float:
        """How much longer the window is than the base's own, as far as the table knows."""
        return self.factor / self.facts.ramp.factor if self.facts.ramp else self.factor

    @property
    def attention_factor(self) -> float:
        """Search-free YaRN's multiplier of cos and sin, times what the base has already."""
        scaling = self.facts.scaling
        if scaling is None:
            return yarn_attention_factor(self.factor)
        already = yarn_attention_factor(self.facts.ramp.factor) if self.facts.ramp else 1.0
        return scaling.attention_factor * (yarn_attention_factor(self.factor) / already)

    def betas(self) -> tuple[float, float]:
        """Betas whose unrounded ramp is the one of the start."""
        if not self.truncate:
            return self.beta_fast, self.beta_slow
        return snapped_betas(self.facts.theta, self.facts.dim, self.original, self.beta_fast, self.beta_slow)

    def yarn(self, factor: Scalar, beta_fast: Scalar, beta_slow: Scalar, truncate: bool = False) -> Tensor:
        """The table of these numbers over this base, `[d/2]`; differentiable."""
        numbers = factor, self.original, beta_fast, beta_slow
        return yarn_inv_freq(self.facts.theta, self.facts.dim, *numbers, truncate, base=self.laid_over)

    def inv_freq(self) -> Tensor:
        """Search-free YaRN's table, float32 `[d/2]`."""
        return self.yarn(self.factor, self.beta_fast, self.beta_slow, self.truncate)

    def over_base(self, plain: Tensor) -> Tensor:
        """What a method makes of unscaled RoPE, made of the base's own table instead, `[d/2]`."""
        if self.facts.scaling is None:
            return plain
        return self.facts.table(self.window)[0] * (plain / default_inv_freq(self.facts.theta, self.facts.dim))
