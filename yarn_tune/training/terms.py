"""The terms of the loss, one row per term: what weight a term gives each target.

A target has two losses: its NLL, and the KL divergence of the prediction from the base's own. A term gives every target
a weight on each, and the loss of a batch is the weighted sum over all terms of a run:

    term               weight on the NLL                weight on the KL divergence
    next-token         1, but 0 on answers              0
    distill            0                                1, but 0 on answers
    preserve           0                                1 inside the native window, 0 beyond it and on answers
    short context      0                                `train.short_context_kl` inside the native window, 0 on answers
    answers            `train.answer_weight` on answers 0

Answers are those to planted questions (`data.needles`). The base, which reads at most its native window, cannot
predict them, so their NLL is in the loss under every objective.

A new objective is a row of `OBJECTIVES` and a value of `train.objective` (`recipe/schema.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

BaseReads = Literal["nothing", "native", "slid"]
"""What the base reads of each row to predict it: nothing, the first native window, or all of it with the native window
slid along the row."""


@dataclass(frozen=True)
class Targets:
    """The targets of a batch, one entry per target."""

    answers: Tensor
    """Whether the target belongs to an answer to a planted question, bool `[targets]`."""
    native: Tensor
    """Whether it is predicted from inside the native window, bool `[targets]`."""


@dataclass(frozen=True)
class Weights:
    """The weights of both losses of each target, float32 `[targets]`."""

    nll: Tensor
    kl: Tensor

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(self.nll + other.nll, self.kl + other.kl)


@dataclass(frozen=True)
class Term:
    """A term of the loss."""

    base_reads: BaseReads
    weights: Callable[[Targets, float], Weights]
    """(targets, the term's weight in the recipe) -> the weights of each target."""


def _on_nll(where: Tensor, weight: float) -> Weights:
    return Weights(where * weight, where * 0.0)


def _on_kl(where: Tensor, weight: float) -> Weights:
    return Weights(where * 0.0, where * weight)


OBJECTIVES: dict[str, Term] = {
    "next-token": Term("nothing", lambda targets, weight: _on_nll(~targets.answers, weight)),
    "distill": Term("slid", lambda targets, weight: _on_kl(~targets.answers, weight)),
    "preserve": Term("native", lambda targets, weight: _on_kl(targets.native & ~targets.answers, weight)),
}
"""Value of `train.objective` -> its term, which has the weight 1."""
SHORT_CONTEXT = Term("native", lambda targets, weight: _on_kl(targets.native & ~targets.answers, weight))
ANSWERS = Term("nothing", lambda targets, weight: _on_nll(targets.answers, weight))
