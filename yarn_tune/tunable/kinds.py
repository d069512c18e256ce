"""The kinds of learned numbers, one row per kind.

The optimizer's groups, rates and decays, the counts in a plan, the cost of a step, reports and documents read this
table. A kind that acts in the weights has an `Adjustment` (its parameters) and a `WeightFold` (how its values are
applied and folded); its row here makes it part of every run for which `learned` is true.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..recipe import Decays, Lora, Rates, Rope, Train
from .parameters import Adjustment
from .qk_bias import biases_for
from .query_gains import gains_for


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of learned number."""

    name: str
    """Name in `train.learning_rate`, `train.weight_decay` and counts."""
    key: str
    """Recipe key that enables it."""
    label: str
    """Name in sentences of reports and messages."""
    identity: float
    """Value in natural units that leaves search-free YaRN (or the base's weights) unchanged."""
    learned: Callable[[Rope, Lora | None], bool]
    """Whether a recipe with these sections learns numbers of this kind."""
    rate: Callable[[Rope], float]
    """Default peak learning rate of the offsets."""
    decay: float = 0.0
    """Default weight decay."""
    folded_into: str
    """Where the export puts the values."""
    make: Callable[[dict[str, Any], Rope], Adjustment | None] | None = None
    """Makes the parameters from config.json of the base; None where another row or the rotary module has them."""
    kept_queries: int = 0
    """Copies of the queries that a layer keeps between the passes for the gradients of this kind."""


def _gain_rate(rope: Rope) -> float:
    """The rate of log gains: numbers that scale more of the queries get a lower rate."""
    return {"layer": 0.01, "head": 0.02}.get(rope.query_gains, 0.03)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="frequency",
            key="rope.frequencies",
            label="frequencies of rotary pairs",
            identity=1.0,
            learned=lambda rope, lora: rope.frequencies != "fixed",
            rate=lambda rope: Rates.frequency,
            decay=Decays.frequency,
            folded_into="config",
        ),
        Kind(
            name="temperature",
            key="rope.frequencies",
            label="the attention temperature",
            identity=1.0,
            learned=lambda rope, lora: rope.frequencies != "fixed",
            rate=lambda rope: Rates.temperature,
            decay=Decays.temperature,
            folded_into="config, or queries where a stack reads no key for it",
        ),
        Kind(
            name="bias",
            key="rope.qk_bias",
            label="biases of queries and keys",
            identity=0.0,
            learned=lambda rope, lora: rope.qk_bias,
            rate=lambda rope: Rates.bias,
            decay=Decays.bias,
            folded_into="biases of the query and key projections, and the config key that switches them on",
            make=lambda config, rope: biases_for(config, rope.qk_bias),
        ),
        Kind(
            name="gain",
            key="rope.query_gains",
            label="gains of the queries",
            identity=1.0,
            learned=lambda rope, lora: rope.query_gains != "none",
            rate=_gain_rate,
            decay=Decays.gain,
            folded_into="query projection, or the norm that follows it",
            make=lambda config, rope: gains_for(config, rope.query_gains),
            kept_queries=1,
        ),
        Kind(
            name="phase",
            key="rope.query_gains",
            label="phases of the queries",
            identity=0.0,
            learned=lambda rope, lora: rope.query_gains == "pair_phase",
            rate=lambda rope: Rates.phase,
            decay=Decays.phase,
            folded_into="query projection",
            kept_queries=1,  # the other dimension of each pair
        ),
        Kind(
            name="lora",
            key="lora",
            label="LoRA factors",
            identity=0.0,
            learned=lambda rope, lora: lora is not None,
            rate=lambda rope: Rates.lora,
            decay=Decays.lora,
            folded_into="target weights",
        ),
    )
}
"""All kinds by name, in the order of the optimizer's groups; adjustments are applied in this order too."""


def kinds_of(rope: Rope, lora: Lora | None = None) -> list[Kind]:
    """The kinds that a recipe with these sections learns."""
    return [kind for kind in KINDS.values() if kind.learned(rope, lora)]


def adjustments_for(config: dict[str, Any], rope: Rope) -> tuple[Adjustment, ...]:
    """The parameters of all kinds that act in the weights, at the identity.

    Args:
        config: config.json of the base.
        rope: section of the recipe.

    Raises:
        UserError: if this family does not support one of them, with the reason.
    """
    made = [kind.make(config, rope) for kind in kinds_of(rope) if kind.make is not None]
    return tuple(adjustment for adjustment in made if adjustment is not None)


def rate_of(kind: str, train: Train, rope: Rope) -> float:
    """Peak learning rate of a kind: the recipe's, or the default of its row."""
    given = train.learning_rate
    own = getattr(given, kind, None) if isinstance(given, Rates) else given
    return KINDS[kind].rate(rope) if own is None else own


def decay_of(kind: str, train: Train) -> float:
    """Weight decay of a kind: the recipe's, or the default of its row."""
    given = train.weight_decay
    return getattr(given, kind, KINDS[kind].decay) if isinstance(given, Decays) else given
