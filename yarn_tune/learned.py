"""What is learned, in natural units, and where learning starts."""

import math
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .errors import UserError
from .families import RopeFacts, load_config, rope_facts
from .lora import Factors
from .rope import longrope_inv_freq, yarn_inv_freq
from .sections import Recipe, Rope


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Learned numbers in natural units, enough to rebuild the table: what the export serves.

    The table is `factors`, where given; else YaRN's over a window of `original` tokens, of which only the ratio to
    the betas matters.
    """

    learn: str
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
        if self.learn == "ramp":
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
    """Where learning starts: search-free YaRN for this base and window."""

    facts: RopeFacts
    native: int
    window: int
    factor: float
    beta_fast: float
    beta_slow: float

    @classmethod
    def of(cls, facts: RopeFacts, rope: Rope) -> "Start":
        """Fill the recipe's nulls from the base model.

        Raises:
            UserError: if the window is smaller than the native one.
        """
        native = rope.native or facts.native
        if rope.window < native:
            raise UserError(
                f"rope.window: {rope.window} is smaller than the base model's native window {native}; "
                "this tool only extends (rope.native overrides what the config says)"
            )
        return cls(
            facts=facts,
            native=native,
            window=rope.window,
            factor=rope.factor or rope.window / native,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
        )

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> "Start":
        """`of` for the base a recipe names; reads its config, no weights."""
        return cls.of(rope_facts(load_config(recipe.base.model, recipe.base.revision)), recipe.rope)

    def inv_freq(self) -> Tensor:
        """Search-free YaRN's table, float32 `[d/2]`."""
        return yarn_inv_freq(self.facts.theta, self.facts.dim, self.factor, self.native, self.beta_fast, self.beta_slow)
