"""Learned numbers in natural units, and the values from which learning starts.

`Start` is the start of the rotary table. `Learned` holds everything that a run has learned: the table and temperature,
the numbers that act in the weights (one `WeightFold` per kind), and LoRA's factors.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models import RopeFacts
from ..recipe import RAMPED, YARN, Rope
from ..rope import (
    LEAST_SHARE,
    Scalar,
    YarnRamp,
    cope_inv_freq,
    default_inv_freq,
    longrope_inv_freq,
    proportional_inv_freq,
    search_free_inv_freq,
    snapped_betas,
    yarn_attention_factor,
    yarn_inv_freq,
)
from .lora import Factors


@dataclass(frozen=True)
class WeightFold(ABC):
    """Values of one kind of learned number that acts in the weights.

    The same values can be applied by hooks to the outputs of modules (`adjust`) or folded into tensors of a checkpoint
    (`fold`); both give the same model in exact arithmetic. The tensor fields of a subclass are the values.
    """

    kind: ClassVar[str]
    """Name of the kind in `kinds.KINDS`."""

    @abstractmethod
    def acts_on(self, module: str) -> bool:
        """Whether the output of a module is changed, by its dotted name."""

    @abstractmethod
    def adjust(self, module: str, output: Tensor) -> Tensor:
        """The changed output of that module, `[..., rows]`, in the same dtype."""

    @abstractmethod
    def holds(self, tensor: str) -> bool:
        """Whether a tensor of the checkpoint is changed, by its name."""

    @abstractmethod
    def fold(self, name: str, tensor: Tensor) -> Tensor:
        """The changed tensor in float64; `tensor` is one that `holds` accepts, `[rows, ...]`."""

    def added(self) -> dict[str, torch.Size]:
        """Tensors, by name, that the checkpoint lacks and that are zero before folding."""
        return {}

    def config_changes(self) -> dict[str, Any]:
        """Keys of config.json that the folded checkpoint needs."""
        return {}

    def summary(self) -> dict[str, float]:
        """A few numbers for a progress line."""
        return {}

    def values(self) -> dict[str, Tensor]:
        """The values by the names of their fields."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def placed(self, model: nn.Module) -> "WeightFold":
        """These values on the device of a model, in float32, or in float64 for a float64 model."""
        like = next(model.parameters())
        real = torch.float64 if like.dtype == torch.float64 else torch.float32  # not every device has float64
        dtypes = {name: real.to_complex() if value.is_complex() else real for name, value in self.values().items()}
        return replace(self, **{name: value.to(dtypes[name]).to(like.device) for name, value in self.values().items()})


class Adjustment(nn.Module, ABC):
    """Trainable numbers of one or more kinds that act in the weights, as offsets from the identity."""

    place: ClassVar[str]
    """First part of the parameters' names in a saved run."""

    @abstractmethod
    def forward(self) -> WeightFold:
        """The current values, differentiable."""

    @abstractmethod
    def exact(self) -> WeightFold:
        """The values in double precision, on the CPU, detached."""

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by the name of their kind."""

    def unscaled(self) -> bool:
        """Whether learning rates are relative to activation sizes that were not measured yet."""
        return False

    def observe(self, module: str, output: Tensor) -> None:  # noqa: B027
        """Add the output of a module to the measurement of activation sizes."""

    def set_scale(self, total: Callable[[Tensor], Tensor]) -> None:  # noqa: B027
        """Finish the measurement of activation sizes; `total` sums a tensor over all processes."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Learned numbers in natural units, as they are compared, exported and served.

    The table is given by `factors`; where that is None, it is YaRN's over a window of `original` tokens, of which only
    the ratio to the betas matters.
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
    folds: tuple[WeightFold, ...] = ()
    """Numbers that act in the weights, in double precision, in the order in which they are applied."""
    lora: Factors | None = None
    """Changes of the weights, merged before anything is folded; see `lora.py`."""

    @property
    def gains(self) -> Tensor | None:
        """Gains of the queries, `[tuned layers, groups, d/2]`, complex with phases; None if none were learned."""
        return next((fold.values()["gains"] for fold in self.folds if fold.kind == "gain"), None)

    @property
    def attention_factor(self) -> float:
        """The multiplier of cos and sin, 1 / sqrt(temperature)."""
        return 1.0 / math.sqrt(self.temperature)

    @property
    def config_theta(self) -> float:
        """The theta of the config from which the slowest pair gets its factor, where only theta can change."""
        assert self.factors is not None
        facts = self.facts
        stretched = facts.theta * self.factors[-1] ** (facts.dim / (facts.dim - 2))
        return float(stretched ** (facts.head_dim / facts.dim))

    def inv_freq(self) -> Tensor:
        """The table as a stock model computes it from these numbers, float32 `[d/2]`."""
        theta, dim = self.facts.theta, self.facts.dim
        if self.facts.theta_only:
            return proportional_inv_freq(self.config_theta, dim, self.facts.head_dim)
        if self.factors is not None:
            return longrope_inv_freq(theta, dim, self.factors)
        assert self.scale is not None
        assert self.original is not None
        assert self.beta_fast is not None
        assert self.beta_slow is not None
        return yarn_inv_freq(
            theta, dim, self.scale, YarnRamp(self.original, self.beta_fast, self.beta_slow, self.truncate)
        )

    def summary(self) -> dict[str, float]:
        """A few numbers for a progress line."""
        shown = {"temperature": self.temperature}
        if self.scale is not None:
            shown["scale"] = self.scale
        if self.frequencies == "ramp":
            shown |= {"beta_fast": self.beta_fast or 0.0, "beta_slow": self.beta_slow or 0.0}
        if self.factors is not None:
            shown |= {"slowest_factor": self.factors[-1], "largest_factor": max(self.factors)}
        for fold in self.folds:
            shown |= fold.summary()
        return shown

    def as_json(self) -> dict[str, Any]:
        """All values except the base's facts, with only the shapes of values that act in the weights."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("facts", "folds", "lora")}
        folds = {
            fold.kind: {n: {"shape": list(v.shape), "complex": v.is_complex()} for n, v in fold.values().items()}
            for fold in self.folds
        }
        return named | {"folds": folds, "lora": sorted(self.lora or ())}


@dataclass(frozen=True, kw_only=True)
class Start:
    """The start of learning: search-free YaRN for this base and window, or another search-free method.

    For a base with YaRN in its config, it is the base's own YaRN with a larger factor; for a base with another scaling,
    YaRN is applied to the base's table. With window = native it is the base itself.
    """

    facts: RopeFacts
    native: int
    """Window of the base."""
    window: int
    factor: float
    """YaRN's factor over a window of `original` tokens."""
    original: int
    """Window within which the betas count turns: the native one, or that of the YaRN in the base's config."""
    beta_fast: float
    beta_slow: float
    truncate: bool = True
    method: str = YARN
    """A key of `recipe.METHODS`."""

    @classmethod
    def of(cls, facts: RopeFacts, rope: Rope) -> "Start":
        """Fill the recipe's nulls from the base model.

        Raises:
            UserError: if the window is smaller than the native one or than the base attends to, or the betas are not
                those of the YaRN in the base's config.
        """
        native = rope.native or facts.native
        if rope.window < native:
            raise UserError(
                f"rope.window: {rope.window} is smaller than the base model's native window {native}; "
                "yarn-tune only extends windows (rope.native overrides the config)"
            )
        if facts.sliding_window is not None and rope.window > facts.sliding_window:
            raise UserError(
                f"rope.window: {rope.window}, but layers of this base attend to the last {facts.sliding_window} "
                "tokens only (sliding window), which no change of RoPE extends"
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
        # The factor of a base's own YaRN is never reduced: a window within the base's needs no larger one.
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
            method=rope.method,
        )

    @property
    def ramped(self) -> bool:
        """Whether the table is a YaRN ramp."""
        return self.method in RAMPED

    @property
    def laid_over(self) -> Tensor | None:
        """The base's own table `[d/2]`, if YaRN is applied to a table that is scaled already; otherwise None."""
        scaling = self.facts.scaling
        return None if scaling is None or scaling.ramp else scaling.table(self.window)[0]

    @property
    def stretch(self) -> float:
        """The factor relative to that of the YaRN in the base's config."""
        return self.factor / self.facts.ramp.factor if self.facts.ramp else self.factor

    @property
    def attention_factor(self) -> float:
        """The method's multiplier of cos and sin, including that of the base's own scaling; only YaRN changes it.

        Where queries grow with their position, it is the base's: that growth takes the place of YaRN's temperature.
        """
        scaling = self.facts.scaling
        if self.method != YARN:
            return self.facts.table(self.window)[1]
        if self.facts.query_growth:
            return scaling.attention_factor if scaling else 1.0
        if scaling is None:
            return yarn_attention_factor(self.factor)
        already = yarn_attention_factor(self.facts.ramp.factor) if self.facts.ramp else 1.0
        return scaling.attention_factor * (yarn_attention_factor(self.factor) / already)

    def betas(self) -> tuple[float, float]:
        """Betas whose unrounded ramp equals the ramp of the start."""
        if not self.truncate:
            return self.beta_fast, self.beta_slow
        return snapped_betas(self.facts.theta, self.facts.dim, self.original, self.beta_fast, self.beta_slow)

    def yarn(self, factor: Scalar, beta_fast: Scalar, beta_slow: Scalar, truncate: bool = False) -> Tensor:
        """The table of these numbers over this base, `[d/2]`; differentiable."""
        ramp = YarnRamp(self.original, beta_fast, beta_slow, truncate)
        return yarn_inv_freq(self.facts.theta, self.facts.dim, factor, ramp, base=self.laid_over)

    def inv_freq(self) -> Tensor:
        """The method's table, float32 `[d/2]`, without frequencies of 0."""
        return self.table(LEAST_SHARE)[0]

    def table(self, least: float = 0.0) -> tuple[Tensor, float]:
        """The method's table, float32 `[d/2]`, and its multiplier of cos and sin.

        Args:
            least: the least share of its frequency that CoPE leaves to a pair.
        """
        if self.ramped:
            found = self.yarn(self.factor, self.beta_fast, self.beta_slow, self.truncate)
        elif self.method == "cope":
            found = cope_inv_freq(self.facts.table(self.window)[0], least=least)
        else:
            theta, dim = self.facts.theta, self.facts.dim
            found = self.over_base(search_free_inv_freq(self.method, theta, dim, self.stretch, self.native))
        return found, self.attention_factor

    def over_base(self, plain: Tensor) -> Tensor:
        """The change that a method makes to unscaled RoPE, applied to the base's own table, `[d/2]`."""
        if self.facts.scaling is None:
            return plain
        return self.facts.table(self.window)[0] * (plain / default_inv_freq(self.facts.theta, self.facts.dim))
