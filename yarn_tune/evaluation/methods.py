"""The methods a comparison measures: the base, search-free scalings of RoPE, and learned numbers."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from ..recipe import METHODS, YARN
from ..rope import dynamic_ntk_inv_freq
from ..tunable import THETAS, Factors, Learned, Start, WeightFold, attach_fixed, detach, with_lora

TableOf = Callable[[int], tuple[Tensor, float]]
"""Length read in tokens -> (inverse frequencies `[d/2]` in radians per token, attention factor)."""


@dataclass(frozen=True)
class Method:
    """One way to compute attention with the base's weights: a rotary table, and optionally gains and LoRA."""

    table_of: TableOf
    folds: tuple[WeightFold, ...] = ()
    """Learned numbers that act in the weights."""
    lora: Factors | None = None
    """Low-rank changes of the weights."""
    by_length: bool = False
    """Whether the table depends on the length read."""

    @classmethod
    def fixed(cls, inv_freq: Tensor, attention_factor: float = 1.0) -> "Method":
        """A method with one table for every length."""
        return cls(lambda length: (inv_freq, attention_factor))

    @classmethod
    def of(cls, learned: Learned) -> "Method":
        """The method that learned numbers define."""
        table = (learned.inv_freq(), learned.attention_factor)
        return cls(lambda length: table, learned.folds, learned.lora)

    @contextmanager
    def on(self, model: PreTrainedModel, length: int | None = None) -> Iterator[None]:
        """Apply the method to a model inside a `with` block; with the table of `length`, if one is given."""
        table = None if length is None else self.table_of(length)
        with with_lora(model, self.lora):
            attach_fixed(model, self.table_of if table is None else lambda read: table, self.folds)
            try:
                yield
            finally:
                detach(model)

    def key(self, length: int) -> list[object]:
        """The numbers that define the method at a length, as JSON values."""
        inv_freq, factor = self.table_of(length)
        folds = [[fold.kind, *map(_digest, fold.values().values())] for fold in self.folds]
        lora = [[name, *map(_digest, pair)] for name, pair in (self.lora or {}).items()]
        return [inv_freq.tolist(), factor, *folds, *lora]


def _digest(tensor: Tensor) -> str:
    """A hash of a tensor's shape, dtype and bytes."""
    stored = tensor.detach().cpu().contiguous()
    described = f"{stored.dtype} {list(stored.shape)}".encode()
    return hashlib.sha256(described + stored.numpy().tobytes()).hexdigest()


ORDER = ("none", "linear", "ntk", "dynamic", "abf", "llama3", "cope", "ntk-by-parts", YARN)
"""The order of the rows."""


def search_free_methods(start: Start, names: Sequence[str]) -> dict[str, Method]:
    """`none` (the base as it is), the search-free methods of `names` and `yarn`, in the order of the tables.

    All are at the factor of `start`, except `cope`, which has no factor. Over a base that is scaled already, each
    method is applied to the base's own table. Methods that no config of the family can carry are left out (`servable`).

    Args:
        start: the base and the factor.
        names: keys of `eval.methods`.
    """
    facts, native, factor = start.facts, start.native, start.stretch
    theta, dim, multiplier = facts.theta, facts.dim, facts.table(start.window)[1]

    def dynamic(length: int) -> tuple[Tensor, float]:
        return start.over_base(dynamic_ntk_inv_freq(theta, dim, factor, length, native)), multiplier

    methods = {
        "none": Method(facts.table, by_length=facts.scaling is not None and facts.scaling.above > 0),
        "dynamic": Method(dynamic, by_length=True),
        **{name: Method.fixed(*replace(start, method=name).table()) for name in METHODS if name in (*names, YARN)},
    }
    named = servable(("none", YARN, *names), facts.theta_only)
    return {name: methods[name] for name in ORDER if name in methods and name in named}


def servable(names: Sequence[str], theta_only: bool) -> list[str]:
    """The methods of `names` that a config of the family can carry; with `theta_only`, those that change theta."""
    return [name for name in names if not theta_only or name in ("none", *THETAS)]
