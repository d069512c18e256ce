"""A gradient from forward passes alone, at the memory of inference, for the few numbers of the low rungs.

Up to four numbers are moved one by one (central differences); more are moved together along random signs (SPSA, Spall
1992, doi:10.1109/9.119632), `probes` directions a step. Directions are a function of seed and step, so every process
probes the same ones and a resumed run goes on exactly.
"""

import random
from collections.abc import Callable

import torch
from torch import nn

SIZE = 0.01
"""How far a number is moved, in log space: above float32 noise in the loss, below the curvature."""

ONE_BY_ONE = 4
"""Up to so many numbers are moved one by one."""


def directions(count: int, probes: int, seed: int, step: int) -> list[list[float]]:
    """Directions to probe, each with an entry a number; their outer products average to the unit matrix."""
    if count <= ONE_BY_ONE:
        # Scaled so that the mean over directions, as for SPSA, gives each number its difference.
        return [[float(i == j) * count**0.5 for j in range(count)] for i in range(count)]
    rng = random.Random(f"probes/{seed}/{step}")
    return [[rng.choice((-1.0, 1.0)) for _ in range(count)] for _ in range(probes)]


def passes(count: int, probes: int) -> int:
    """Forward passes of a step that learns `count` numbers: two a direction, and one for the loss that is told."""
    return 2 * (count if count <= ONE_BY_ONE else probes) + 1


@torch.no_grad()
def estimate_gradient(
    parameters: list[nn.Parameter], read: Callable[[], tuple[float, float]], probes: int, seed: int, step: int
) -> None:
    """Set `.grad` of the parameters from differences of the first of `read()`, which is asked twice a direction.

    The parameters are left as they were, to the bit.
    """
    origin = [parameter.clone() for parameter in parameters]
    count = sum(parameter.numel() for parameter in parameters)
    found = [torch.zeros_like(parameter) for parameter in parameters]
    tried = directions(count, probes, seed, step)
    for direction in tried:
        parts = torch.tensor(direction).split([parameter.numel() for parameter in parameters])
        moves = [part.reshape(p.shape).to(p.device) for part, p in zip(parts, parameters, strict=True)]
        values = []
        for sign in (1, -1):
            for parameter, at, move in zip(parameters, origin, moves, strict=True):
                parameter.copy_(at + sign * SIZE * move)
            values.append(read()[0])
        slope = (values[0] - values[1]) / (2 * SIZE)
        for gradient, move in zip(found, moves, strict=True):
            gradient += slope * move / len(tried)
    for parameter, at, gradient in zip(parameters, origin, found, strict=True):
        parameter.copy_(at)
        parameter.grad = gradient
