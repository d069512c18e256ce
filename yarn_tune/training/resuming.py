"""Checkpoints of a run in progress: what is saved, what is loaded, and what all processes must agree on."""

import hashlib
from array import array
from dataclasses import dataclass

import torch
from safetensors.torch import save

from ..data import RowSet
from ..distributed import World
from ..recipe import Recipe
from ..runs import (
    EARLIER,
    Run,
    State,
    latest_state,
    load_optimizer_tensors,
    optimizer_tensors,
    previous_run,
    save_state,
)
from ..tunable import TunableRotary


@dataclass(frozen=True)
class Progress:
    """The state of a run in progress, which only the main process writes."""

    run: Run
    world: World
    rotary: TunableRotary
    optimizer: torch.optim.Optimizer

    def resume(self) -> int:
        """Load the newest intact checkpoint, else the numbers of `rope.init`; returns the number of steps done."""
        state = latest_state(self.run.checkpoints)
        if state is None:
            self._begin()
            return 0
        self.rotary.load_numbers(state.numbers)
        load_optimizer_tensors(self.optimizer, state.optimizer)
        return state.step

    def _begin(self) -> None:
        earlier = previous_run(self.run.recipe)
        if earlier is not None:
            self.rotary.load_numbers(earlier.numbers)
        if not self.world.main:
            return
        if earlier is not None:
            earlier.note(self.run.folder)
        else:  # the note of a run with other settings that ended before its first checkpoint
            (self.run.folder / EARLIER).unlink(missing_ok=True)

    def save(self, step: int) -> None:
        """Save the state after `step` steps."""
        if self.world.main:
            state = State(step, self.rotary.numbers(), optimizer_tensors(self.optimizer))
            save_state(self.run.checkpoints, state, self.run.recipe.train.keep_checkpoints)


def facts_to_agree_on(recipe: Recipe, rotary: TunableRotary, rows: RowSet, done: int) -> dict[str, object]:
    """What all processes must start from, by name; rows and learned values as digests."""
    tokens = hashlib.sha256()
    for row in rows.rows:
        tokens.update(array("q", row.input_ids))
    return {
        "recipe": recipe.to_dict(),
        "learned values": hashlib.sha256(save(rotary.numbers())).hexdigest(),
        "checkpoint": done,
        "rows": tokens.hexdigest(),
    }
