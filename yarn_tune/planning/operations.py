"""The floating-point operations of a step.

A forward pass takes 2 x parameters x tokens operations in matrices, without the experts that a token is not sent to,
and 4 x layers x width x tokens^2 / 2 in causal attention. With frozen weights, a backward pass computes gradients of
activations only: as many operations again in matrices, and 2.5 times as many in attention, whose kernel computes five
products in place of two. Checkpointing adds one forward pass, without attention if `train.keep_attention` is true;
tiled MLPs are computed once more. The base needs one forward pass per window.
"""

from dataclasses import dataclass

from ..recipe import Recipe
from ..training import ObjectiveConfig, windows
from .shape import Shape

BACKWARD_ATTENTION = 2.5
"""Operations of attention's backward pass, as a multiple of its forward pass."""


@dataclass(frozen=True)
class Forward:
    """The operations of a forward pass."""

    dense: float
    """Per token, in matrices."""
    attention: float
    """Per pair of tokens."""
    mlp: float
    """Per token, in the matrices of the MLPs alone."""

    @classmethod
    def of(cls, shape: Shape) -> "Forward":
        """The operations for a model of this shape."""
        return cls(
            dense=2.0 * (shape.active - shape.embedding),
            attention=4.0 * shape.attending * shape.queries,
            mlp=6.0 * shape.layers * shape.hidden * shape.inner,
        )

    def __call__(self, tokens: int, dense: float = 1.0, attention: float = 1.0) -> float:
        """Operations for a row of `tokens` tokens.

        Args:
            tokens: length of the row.
            dense: how many times the matrices are computed.
            attention: how many times attention is computed.
        """
        return dense * self.dense * tokens + attention * self.attention * tokens * tokens / 2


def row_operations(recipe: Recipe, length: int, shape: Shape) -> float:
    """Operations for a row of `length` tokens: forward, backward, and what the base reads."""
    train, forward = recipe.train, Forward.of(shape)
    native = recipe.rope.native or shape.native
    objective = ObjectiveConfig.of(train, native)
    passes = {"nothing": 0, "native": 1, "slid": len(windows(length, native, objective.stride))}[objective.base_reads]
    again = train.gradient_checkpointing
    attention = 1 + BACKWARD_ATTENTION + (again and not train.keep_attention)
    dense = 2 + again + (forward.mlp / forward.dense if train.tiled_mlp is not None else 0.0)
    return forward(length, dense=dense, attention=attention) + passes * forward(min(native, length))


def step_operations(recipe: Recipe, shape: Shape) -> float:
    """Operations of a step, over all processes; the mean over the steps of the run."""
    train, row_tokens = recipe.train, recipe.row_tokens()
    lengths = [recipe.data.length_at(step, train.steps) or row_tokens for step in range(train.steps)]
    total = sum(row_operations(recipe, length, shape) * (row_tokens // length) for length in lengths)
    return total * train.batch_size / train.steps
