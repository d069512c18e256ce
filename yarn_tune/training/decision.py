"""The end of a run with `train.decide`: keep the state with the lowest loss on validation rows, or search-free YaRN.

Candidates are the final and the averaged numbers, each with its offsets from search-free YaRN multiplied by a few
factors. The validation rows come from documents that the run does not train on. A decision depends only on the last
checkpoint and on these rows, so one that is interrupted is made again by the same command.
"""

import signal

import torch
from torch import Tensor

from ..data import Placed, RowSet
from ..distributed import Release, Request, World
from ..errors import Interrupted
from ..files import Tensors
from ..runs import Candidate, Decision, Iterate
from ..tunable import is_offset
from .batches import collate, part_of
from .objective import Objective

FACTORS = (1.0, 0.75, 0.5, 0.25)
PLAN: list[tuple[Iterate, float]] = [
    *(("final", factor) for factor in FACTORS),
    *(("average", factor) for factor in FACTORS),
    ("final", 0.0),
]
"""The candidates: (numbers, factor of their offsets). The last one is search-free YaRN."""


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


def decide(
    objective: Objective, average: Tensors, rows: RowSet, length: int, world: World, release: Release, request: Request
) -> Decision:
    """Measure all candidates, and load the chosen one into the objective's learned numbers.

    Args:
        objective: the objective of the run, with the numbers after the last step.
        average: the averaged numbers.
        rows: the validation rows.
        length: tokens that the rows are cut to.
        world: the processes; each measures its part of the rows.
        release: function to call after each forward pass.
        request: a signal to stop, which is checked after each candidate.

    Raises:
        Interrupted: if a signal was received.
    """
    rotary = objective.rotary
    states = {"final": rotary.numbers(), "average": average}
    pieces = [piece for row in rows.rows for piece in row.pieces(length, rows.prefix)]
    candidates = []
    for iterate, factor in PLAN:
        rotary.load_numbers(scaled(states[iterate], factor))
        losses, nll = _row_losses(objective, pieces, world, release).unbind(1)
        candidates.append(Candidate(iterate, factor, losses.tolist(), nll.mean().item()))
        if stopped := request.agreed(world.accelerator):
            raise Interrupted(
                stopped,
                f"stopped by {signal.Signals(stopped).name} while the learned states were compared; all steps are "
                "saved, and the same command compares them again",
            )
    decision = Decision(candidates, len(pieces), length)
    rotary.load_numbers(scaled(states[decision.chosen.iterate], decision.chosen.factor))
    return decision


def scaled(numbers: Tensors, factor: float) -> Tensors:
    """The numbers with all offsets from search-free YaRN multiplied by `factor`.

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
