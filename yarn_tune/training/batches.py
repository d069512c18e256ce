"""The rows of a run and of a step, and the gradient of a step: the same for any number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data import Placed, RowRequest, RowSet, build_rows, build_rows_apart, plant_needles
from ..distributed import Release, World
from ..models import BaseModel
from ..recipe import Recipe
from ..tunable import observe
from .objective import Objective

VALIDATION_ROWS = 16
"""Number of validation rows of `train.decide`, if there are enough documents."""
VALIDATION_SEED = 2_000_000
"""Seed of the first question in validation rows, so that their questions differ from those in training rows."""


def split_rows(recipe: Recipe, base: BaseModel) -> tuple[RowSet, RowSet | None]:
    """The training rows of a run and, with `train.decide`, its validation rows, before questions are planted.

    Raises:
        UserError: if documents are missing or unreadable, or hold too little text.
    """
    request = RowRequest(recipe.row_tokens(), recipe.rows(), recipe.train.seed)
    if recipe.train.decide:
        return build_rows_apart(recipe.data, base, request, VALIDATION_ROWS)
    return build_rows(recipe.data, base, request), None


def read_rows(recipe: Recipe, base: BaseModel) -> tuple[RowSet, RowSet | None]:
    """The training rows of a run and, with `train.decide`, its validation rows; both with planted questions.

    Raises:
        UserError: as `split_rows`; or if rows are too short for a question.
    """
    rows, validation = split_rows(recipe, base)
    data, seed = recipe.data, recipe.train.seed
    planted = None if validation is None else plant_needles(validation, data, base, seed, VALIDATION_SEED)
    return plant_needles(rows, data, base, seed), planted


@dataclass(frozen=True)
class Batch:
    """The rows of one step, over all processes."""

    rows: list[Placed]
    micro_batch_size: int
    """Rows per forward pass."""
    targets: int

    @classmethod
    def of(cls, recipe: Recipe, rows: RowSet, step: int) -> "Batch":
        """The rows of a step, cut to the length of the step."""
        train = recipe.train
        read = rows.batch(step, train.batch_size, train.seed)
        length = recipe.data.length_at(step, train.steps) or recipe.row_tokens()
        cut = [piece for row in read for piece in row.pieces(length, rows.prefix)]
        micro = train.micro_batch_size
        if recipe.runtime.sequence == 1:  # with split rows the number of rows per forward pass is fixed
            # A forward pass reads more of the shorter rows, so that it has as many tokens as with the longest rows.
            micro *= recipe.row_tokens() // length
        return cls(cut, micro, max(1, sum(row.targets for row in cut)))

    def micro_batches(self, world: World) -> Iterator[dict[str, Tensor]]:
        """This process's part of the rows of its group, as the arguments of `Objective.forward`."""
        mine = self.rows[world.group :: world.groups]
        for at in range(0, len(mine), self.micro_batch_size):
            yield part_of(collate(mine[at : at + self.micro_batch_size], world.device), world)


def backward(world: World, objective: Objective, batch: Batch, release: Release) -> tuple[float, float]:
    """Compute the gradients of a batch; returns (loss, NLL), each the mean over the targets of all processes."""
    total = torch.zeros(2, device=world.device)
    for inputs in batch.micro_batches(world):
        value = objective(**inputs)
        (value[0] / batch.targets).backward()
        release()
        total += value.detach()
    loss, nll = (world.total(total) / batch.targets).tolist()
    world.sum_gradients(objective.rotary.trainable())
    return loss, nll


@torch.no_grad()
def measure_scales(world: World, objective: Objective, batch: Batch, release: Release) -> None:
    """Measure the sizes that the rates of some kinds are relative to, on the rows of a batch, unless they are known."""
    unscaled = [each for each in objective.rotary.adjustments if each.unscaled()]
    if not unscaled:
        return
    handles = observe(objective.model, objective.rotary)
    for inputs in batch.micro_batches(world):
        objective(**inputs)
        release()
    for handle in handles:
        handle.remove()
    for adjustment in unscaled:
        adjustment.set_scale(world.total)


def collate(rows: list[Placed], device: torch.device) -> dict[str, Tensor]:
    """Rows as tensors `[b, n]`, by the argument names of `Objective.forward`."""
    batch = {
        name: torch.from_numpy(np.stack([getattr(row, name) for row in rows])).to(device, torch.int64)
        for name in ("input_ids", "position_ids", "labels")
    }
    if any(row.answers for row in rows):
        batch["answers"] = torch.zeros_like(batch["labels"], dtype=torch.bool)
        for marks, row in zip(batch["answers"], rows, strict=True):
            marks[len(marks) - 1 - row.answers : len(marks) - 1] = True
    return batch


def part_of(inputs: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """The part of each row that this process reads (`runtime.sequence`)."""
    if world.sequence == 1:
        return inputs
    return {name: tensor.chunk(world.sequence, 1)[world.part] for name, tensor in inputs.items()}
