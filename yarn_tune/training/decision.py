"""The end of a run with `train.decide`: keep the state with the lowest loss on validation rows, or search-free YaRN.

Candidates are the final and the averaged numbers, each with its offsets from the start (search-free YaRN) multiplied
by a few factors, and the numbers of the earlier checkpoints. The validation rows come from documents that the run does
not train on. A decision depends only on the checkpoints and on these rows, so one that is interrupted is made again by
the same command.
"""

import signal
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Placed, RowSet
from ..distributed import Release, Request, World
from ..errors import Interrupted
from ..files import Tensors
from ..runs import Candidate, Decision
from ..tunable import is_offset
from .batches import collate, part_of
from .objective import Objective

FACTORS = (1.0, 0.75, 0.5, 0.25)
"""Multipliers of the offsets of the final and the averaged numbers."""


def plan_of(steps: Iterable[int]) -> list[tuple[str, float]]:
    """The candidates, (numbers, factor of their offsets), with checkpoints after `steps`; the last one is the start."""
    shrunk = [(iterate, factor) for iterate in ("final", "average") for factor in FACTORS]
    return [*shrunk, *((f"step {step}", 1.0) for step in steps), ("final", 0.0)]


class TailAverage:
    """The mean of the learned numbers over the last half of the steps.

    Averaging removes most of the noise that each step adds (Polyak and Juditsky, 1992).
    """

    def __init__(self, steps: int) -> None:
        self.first = steps // 2
        """The first step in the mean."""
        self.sums: Tensors = {}

    def add(self, step: int, numbers: Tensors) -> None:
        """Add the numbers after a step."""
        if step >= self.first:
            self.sums = {name: self.sums[name] + t if self.sums else t.clone() for name, t in numbers.items()}

    def mean(self, done: int) -> Tensors:
        """The mean after `done` steps."""
        return {name: t / (done - self.first) for name, t in self.sums.items()}


@dataclass(frozen=True)
class States:
    """The states of a run that are compared, besides the final one."""

    average: Tensors
    checkpoints: dict[int, Tensors]
    """Steps done -> numbers."""


def decide(
    objective: Objective, kept: States, rows: RowSet, length: int, world: World, release: Release, request: Request
) -> Decision:
    """Measure all candidates, and load the chosen one into the objective's learned numbers.

    Args:
        objective: the objective of the run, with the numbers after the last step.
        kept: the averaged numbers, and those of earlier checkpoints.
        rows: the validation rows.
        length: tokens that the rows are cut to.
        world: the processes; each measures its part of the rows.
        release: function to call after each forward pass.
        request: a signal to stop, which is checked after each candidate.

    Raises:
        Interrupted: if a signal was received.
    """
    rotary = objective.rotary
    states = {"final": rotary.numbers(), "average": kept.average}
    states |= {f"step {step}": numbers for step, numbers in kept.checkpoints.items()}
    pieces = [piece for row in rows.rows for piece in row.pieces(length, rows.prefix)]
    candidates = []
    for iterate, factor in plan_of(kept.checkpoints):
        rotary.load_numbers(scaled(states[iterate], factor))
        losses, nll = _row_losses(objective, pieces, world, release).unbind(1)
        candidates.append(Candidate(iterate, factor, losses.tolist(), nll.mean().item()))
        if stopped := request.agreed(world.accelerator):
            raise Interrupted(
                stopped,
                f"stopped by {signal.Signals(stopped).name} while the learned states were compared; all steps are "
                "saved, and the same command compares them again",
            )
    decision = Decision(candidates, len(pieces), length, rotary.start.method)
    rotary.load_numbers(scaled(states[decision.chosen.iterate], decision.chosen.factor))
    return decision


def scaled(numbers: Tensors, factor: float) -> Tensors:
    """The numbers with all offsets from the start multiplied by `factor`.

    Numbers that are not offsets are kept; see `is_offset`.
    """
    return {
        name: tensor if not is_offset(name) else tensor * factor if factor else torch.zeros_like(tensor)
        for name, tensor in numbers.items()
    }


@torch.no_grad()
def _row_losses(objective: Objective, rows: list[Placed], world: World, release: Release) -> Tensor:
    """Mean (loss, NLL) over the targets of each row, float64 `[rows, 2]`; the same in all processes."""
    table = torch.zeros(len(rows), 2, device=world.device)
    for turn in range(0, len(rows), world.groups):
        # All processes gather sharded weights together, so a process without a row reads the last row again.
        index = min(turn + world.group, len(rows) - 1)
        value = objective(**part_of(collate([rows[index]], world.device), world))
        release()
        if turn + world.group < len(rows):
            table[index] = value
    targets = torch.tensor([[max(1, row.targets)] for row in rows], dtype=torch.float64)
    return world.total(table).cpu().double() / targets
