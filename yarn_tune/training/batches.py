"""The rows of a step, and what one pass over them gives: the same whatever the number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Placed, RowSet
from ..distributed import Release, World
from ..recipe import Recipe
from .objective import Objective


@dataclass(frozen=True)
class Batch:
    """The rows of one step, over all processes."""

    rows: list[Placed]
    micro_batch_size: int
    """Rows a forward pass."""
    targets: int

    @classmethod
    def of(cls, recipe: Recipe, rows: RowSet, step: int) -> "Batch":
        """Read rows, cut to the step's length, with the targets that count."""
        train = recipe.train
        read = rows.batch(step, train.batch_size, train.seed)
        length = recipe.data.length_at(step, train.steps) or recipe.row_tokens()
        cut = [piece for row in read for piece in row.pieces(length, rows.prefix)]
        micro = train.micro_batch_size
        if recipe.runtime.sequence == 1:  # the exchange of split rows takes no other number of them
            # Shorter rows, more of them at once: as many tokens as the longest rows have.
            micro *= recipe.row_tokens() // length
        return cls(cut, micro, max(1, sum(row.targets for row in cut)))

    def micro_batches(self, world: World) -> Iterator[dict[str, Tensor]]:
        """This process's share, collated: its group's rows, and of these its part."""
        mine = self.rows[world.group :: world.groups]
        for at in range(0, len(mine), self.micro_batch_size):
            inputs = collate(mine[at : at + self.micro_batch_size], world.device)
            if world.sequence > 1:
                inputs = {name: tensor.chunk(world.sequence, 1)[world.part] for name, tensor in inputs.items()}
            yield inputs


def backward(world: World, objective: Objective, batch: Batch, release: Release) -> tuple[float, float]:
    """Set gradients for a batch; what is minimised and nats, each a mean over all processes' targets."""
    total = torch.zeros(2, device=world.device)
    for inputs in batch.micro_batches(world):
        value = objective(**inputs)
        (value[0] / batch.targets).backward()
        release()
        total += value.detach()
    aim, nats = (world.total(total) / batch.targets).tolist()
    world.sum_gradients(objective.rotary.trainable())
    return aim, nats


def collate(rows: list[Placed], device: torch.device) -> dict[str, Tensor]:
    """Rows as tensors `[b, n]`."""
    batch = {
        "input_ids": torch.tensor([row.input_ids for row in rows], device=device),
        "position_ids": torch.tensor([row.position_ids for row in rows], device=device),
        "labels": torch.tensor([row.labels for row in rows], device=device),
    }
    if any(row.answers for row in rows):
        batch["answers"] = torch.zeros_like(batch["labels"], dtype=torch.bool)
        for marks, row in zip(batch["answers"], rows, strict=True):
            marks[len(marks) - 1 - row.answers : len(marks) - 1] = True
    return batch
