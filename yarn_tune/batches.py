"""The rows of a step, and what one pass over them gives: the same whatever the number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .data import RowSet
from .positions import Placed
from .sections import Recipe


@dataclass(frozen=True)
class Batch:
    """The rows of one step, over all processes."""

    rows: list[Placed]
    micro_rows: int
    """Rows a forward pass."""
    targets: int
    tail: int | None
    """Tokens at the end of a row that get a gradient; None: all."""

    @classmethod
    def of(cls, recipe: Recipe, rows: RowSet, step: int) -> "Batch":
        """Read rows, cut to the step's length, with the targets that count."""
        train = recipe.train
        read = rows.batch(step, train.batch_rows, train.seed)
        length = recipe.data.length_at(step, train.steps) or recipe.row_tokens()
        cut = [piece for row in read for piece in row.pieces(length)]
        tail = train.tail if train.tail is not None and train.tail < length else None
        if tail is not None:
            cut = [row.only_last(tail) for row in cut]
        # Shorter rows, more of them at once: as many tokens with a gradient as the longest rows have.
        micro = train.micro_rows * max(1, (train.tail or recipe.row_tokens()) // length)
        return cls(cut, micro, max(1, sum(row.targets for row in cut)), tail)

    def micro_batches(self, accelerator: Accelerator) -> Iterator[dict[str, Any]]:
        """This process's share, collated."""
        mine = self.rows[accelerator.process_index :: accelerator.num_processes]
        for at in range(0, len(mine), self.micro_rows):
            yield collate(mine[at : at + self.micro_rows], accelerator.device) | {"tail": self.tail}


def backward(accelerator: Accelerator, objective: torch.nn.Module, batch: Batch) -> tuple[float, float]:
    """Accumulate gradients over a batch; what is minimised and nats, each a mean over all processes' targets."""
    total = torch.zeros(2, device=accelerator.device)
    for inputs in batch.micro_batches(accelerator):
        value = objective(**inputs)
        # Gradients are averaged over processes, and the loss is a mean over all processes' targets.
        accelerator.backward(value[0] * accelerator.num_processes / batch.targets)
        total += value.detach()
    aim, nats = (accelerator.reduce(total, reduction="sum") / batch.targets).tolist()
    return aim, nats


@torch.no_grad()
def forward_only(accelerator: Accelerator, objective: torch.nn.Module, batch: Batch) -> tuple[float, float]:
    """`backward` without the gradients."""
    total = torch.zeros(2, device=accelerator.device)
    for inputs in batch.micro_batches(accelerator):
        total += objective(**inputs)
    aim, nats = (accelerator.reduce(total, reduction="sum") / batch.targets).tolist()
    return aim, nats


def collate(rows: list[Placed], device: torch.device) -> dict[str, Tensor]:
    """Rows as tensors `[b, n]`. Joined rows get an all-ones mask, which lets spans see each other."""
    batch = {
        "input_ids": torch.tensor([row.input_ids for row in rows], device=device),
        "position_ids": torch.tensor([row.position_ids for row in rows], device=device),
        "labels": torch.tensor([row.labels for row in rows], device=device),
    }
    if any(row.answers for row in rows):
        batch["answers"] = torch.zeros_like(batch["labels"], dtype=torch.bool)
        for marks, row in zip(batch["answers"], rows, strict=True):
            marks[len(marks) - 1 - row.answers : len(marks) - 1] = True
    if rows[0].joined:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch
