"""What a step costs: operations and memory."""

from dataclasses import dataclass

from ..models import GIB
from ..recipe import Recipe
from .memory import step_memory, weight_memory
from .operations import Forward, step_operations
from .shape import Shape


@dataclass(frozen=True)
class Cost:
    """The cost of one step."""

    parameters: int
    """Number of parameters of the base model."""
    step_flops: float
    """Operations over all processes; the mean over the steps of the run."""
    weights_gib: float
    """Weights in one process."""
    activations_gib: float
    """Activations in one process, at the worst moment."""
    forward: Forward

    @property
    def memory_gib(self) -> float:
        """The peak memory of one process."""
        return self.weights_gib + self.activations_gib


def estimate_cost(recipe: Recipe, shape: Shape, numbers: int = 1) -> Cost:
    """Operations and peak memory of a step.

    Args:
        recipe: recipe of the run.
        shape: sizes of its base model.
        numbers: number of learned numbers, without those of LoRA.
    """
    return Cost(
        parameters=shape.parameters,
        step_flops=step_operations(recipe, shape),
        weights_gib=weight_memory(recipe, shape, numbers) / GIB,
        activations_gib=step_memory(recipe, shape, recipe.row_tokens()) / GIB,
        forward=Forward.of(shape),
    )
