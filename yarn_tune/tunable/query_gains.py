"""Gains and phases of the queries, per layer, head and rotary pair.

A gain multiplies the rotated dimensions of the queries and so their logits: it is 1 / temperature. A phase rotates
a pair of dimensions, which shifts the relative position of that pair. Both commute with RoPE
(`models/query_layout.py`), so that they are learned on the queries and folded exactly into the query projection or the
norm that follows it. Keys are unchanged, and so is the KV cache.

The parameters are offsets from the identity, float32, all zero at the start:

    query_gains   parameters                                                          numbers
    layer         log of one gain per tuned layer                                     layers
    head          log of one gain per layer and query head                            layers x heads
    pair          log of one gain per layer, head and rotary pair                     layers x heads x d/2
    pair_phase    log of one gain, and one angle in radians, per layer, head and pair   layers x heads x d

Where all heads share one norm of the queries, `pair` learns one gain per layer and pair. `head` and `pair_phase` are
refused.

Shapes: gains are `[tuned layers, groups, d/2]`, complex with phases; groups are query heads, or 1 for a shared norm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models import QuerySite, query_site, scaled
from .parameters import Adjustment, WeightFold


@dataclass(frozen=True)
class GainFold(WeightFold):
    """Values of the gains of the queries: those that a `Gains` module learned, or a temperature to be folded."""

    kind: ClassVar[str] = "gain"
    site: QuerySite
    gains: Tensor
    """`[tuned layers, groups, d/2]`, real or complex."""

    def acts_on(self, module: str) -> bool:
        """Whether the module returns queries of a tuned layer."""
        return self.holds(f"{module}.weight")

    def adjust(self, module: str, output: Tensor) -> Tensor:
        """Queries `[..., rows]` of that module, multiplied in the precision of the gains."""
        own = self.site.gains_for(f"{module}.weight", self.gains)
        # A norm across heads may return the heads in a dimension of their own (Cohere).
        flat = output if self.site.width <= output.shape[-1] else output.flatten(-2)
        return scaled(flat, self.site, own).reshape(output.shape).to(output.dtype)

    def holds(self, tensor: str) -> bool:
        """Whether the tensor has rows (or a norm's weights) of queries in a tuned layer."""
        return self.site.holds(tensor)

    def fold(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with its rotated query rows multiplied, float64."""
        flat = tensor.double().reshape(-1) if self.site.normed else tensor.double()
        rows_last = (flat + self.site.shift).movedim(0, -1)
        own = self.site.gains_for(name, self.gains)
        return (scaled(rows_last, self.site, own).movedim(-1, 0) - self.site.shift).reshape(tensor.shape)

    def summary(self) -> dict[str, float]:
        """The smallest and the largest gain."""
        sizes = self.gains.abs()
        return {"smallest_gain": sizes.min().item(), "largest_gain": sizes.max().item()}


def uniform_gain(site: QuerySite, gain: float) -> GainFold:
    """One gain for all rotated dimensions of all tuned layers, in double precision."""
    shape = (len(site.layers), site.groups, site.pairs.numel() // 2)
    return GainFold(site, gain * torch.ones(shape, dtype=torch.float64))


class Gains(Adjustment):
    """The trainable offsets of `rope.query_gains`."""

    place = "gains"

    def __init__(self, site: QuerySite, query_gains: str) -> None:
        super().__init__()
        self.site = site
        layers, groups, pairs = len(site.layers), site.groups, site.pairs.numel() // 2
        self._whole = (layers, groups, pairs)
        shape = {"layer": (layers, 1, 1), "head": (layers, groups, 1)}.get(query_gains, self._whole)
        self.log_gain = nn.Parameter(torch.zeros(shape))
        self.phase = nn.Parameter(torch.zeros(shape)) if query_gains == "pair_phase" else None

    def _gains(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """The gains, `[tuned layers, groups, d/2]`, from the parameters after `of`."""
        magnitude = of(self.log_gain).exp().expand(self._whole)
        return magnitude if self.phase is None else torch.polar(magnitude, of(self.phase))

    def forward(self) -> GainFold:
        """The current gains, differentiable; complex with phases."""
        return GainFold(self.site, self._gains(lambda parameter: parameter))

    @torch.no_grad()
    def exact(self) -> GainFold:
        """The gains in double precision, on the CPU."""
        return GainFold(self.site, self._gains(lambda parameter: parameter.cpu().double()))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by kind."""
        groups = {"gain": [self.log_gain]}
        if self.phase is not None:
            groups["phase"] = [self.phase]
        return groups


def gains_for(config: dict[str, Any], query_gains: str) -> Gains | None:
    """Gains at the identity; None for `none`, which learns one temperature for the whole model.

    Args:
        config: config.json of the base.
        query_gains: as in `rope.query_gains`.

    Raises:
        UserError: if they cannot be folded into this family, with the reason.
    """
    if query_gains == "none":
        return None
    try:
        site = query_site(config)
    except UserError as error:
        reason = str(error).removeprefix("folding: ")
        raise UserError(f"rope.query_gains: {query_gains} is folded into the queries, and {reason}") from error
    model_type = config["model_type"]
    if site.normed and query_gains == "pair_phase":
        raise UserError(
            f"rope.query_gains: {query_gains} cannot be folded here: {model_type} normalises queries; use pair"
        )
    if site.groups == 1 and query_gains == "head":
        raise UserError(
            f"rope.query_gains: head cannot be folded here: heads of {model_type} share one norm of the queries; "
            "use layer or pair (one gain per layer and pair)"
        )
    return Gains(site, query_gains)
