"""Gradients against finite differences along the gradient itself, where the signal is largest."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def norm_of(gradients: Iterable[Tensor]) -> float:
    """The Euclidean norm of several tensors together."""
    return math.sqrt(sum(g.square().sum().item() for g in gradients))


def slope_errors(
    loss: Callable[[], Tensor], parameters: Iterable[Tensor], gradients: Sequence[Tensor], steps: Sequence[float]
) -> list[float]:
    """The relative errors of central differences of a loss against its gradient, one per step.

    Curvature spoils the large steps and rounding the small ones, so the smallest error counts. The parameters end
    where they began.
    """
    parameters, norm, errors = list(parameters), norm_of(gradients), []
    with torch.no_grad():
        origin = [parameter.clone() for parameter in parameters]
        for step in steps:
            values = []
            for shift in (step, -step):
                for parameter, gradient, at in zip(parameters, gradients, origin, strict=True):
                    parameter.copy_(at + shift * gradient / norm)
                values.append(loss().double().item())
            errors.append(abs((values[0] - values[1]) / (2 * step) / norm - 1))
        for parameter, at in zip(parameters, origin, strict=True):
            parameter.copy_(at)
    return errors
