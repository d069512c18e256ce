"""The methods a comparison measures: the base, search-free scalings of RoPE, and learned numbers."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from ..rope import (
    abf_theta,
    cope_inv_freq,
    default_inv_freq,
    dynamic_ntk_inv_freq,
    linear_inv_freq,
    llama3_inv_freq,
    ntk_inv_freq,
)
from ..tunable import Factors, Learned, Start, WeightFold, attach_fixed, detach, with_lora

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


LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
"""Llama 3.1's frequency factors."""


def search_free_methods(start: Start, names: Sequence[str]) -> dict[str, Method]:
    """`none` (the base as it is), the search-free methods of `names` and `yarn`, in the order of the tables.

    All are at the factor of `start`, except `cope`, which has no factor. Over a base that is scaled already, each
    method is applied to the base's own table.

    Args:
        start: the base and the factor.
        names: keys of `eval.methods`.
    """
    facts, native, factor = start.facts, start.native, start.stretch
    theta, dim = facts.theta, facts.dim
    own, multiplier = facts.table(start.window)

    def over(plain: Callable[[int], Tensor]) -> Method:
        """A method's table of unscaled RoPE, applied to the base's own table."""
        return Method(lambda length: (start.over_base(plain(length)), multiplier))

    methods = {
        "none": Method(facts.table, by_length=facts.scaling is not None and facts.scaling.above > 0),
        "linear": over(lambda length: linear_inv_freq(theta, dim, factor)),
        "ntk": over(lambda length: ntk_inv_freq(theta, dim, factor)),
        "dynamic": replace(
            over(lambda length: dynamic_ntk_inv_freq(theta, dim, factor, length, native)), by_length=True
        ),
        "abf": over(lambda length: default_inv_freq(abf_theta(theta, native, factor), dim)),
        "llama3": over(lambda length: llama3_inv_freq(theta, dim, factor, LLAMA3_LOW, LLAMA3_HIGH, native)),
        "cope": Method.fixed(cope_inv_freq(own), multiplier),
        "ntk-by-parts": Method.fixed(start.inv_freq(), multiplier),
        "yarn": Method.fixed(start.inv_freq(), start.attention_factor),
    }
    return {name: method for name, method in methods.items() if name in ("none", "yarn", *names)}
