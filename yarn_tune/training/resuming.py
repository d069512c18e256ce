"""Checkpoints of a run in progress: what is saved, what is loaded, and what all processes must agree on."""

import hashlib
from dataclasses import dataclass, field

import torch
from safetensors.torch import save

from ..data import RowSet
from ..distributed import World
from ..files import Tensors
from ..runs import (
    EARLIER,
    Run,
    State,
    check_folder,
    check_inputs,
    checkpoints,
    latest_state,
    load_optimizer_tensors,
    optimizer_tensors,
    previous_run,
    read_state,
    save_state,
)
from ..tunable import TunableRotary
from .decision import TailAverage


@dataclass(frozen=True)
class Progress:
    """The state of a run in progress, which only the main process writes."""

    run: Run
    world: World
    rotary: TunableRotary
    optimizer: torch.optim.Optimizer
    inputs: dict[str, str]
    """Name of an input of the run -> digest."""
    average: TailAverage
    recent: dict[int, Tensors] = field(default_factory=dict)
    """Steps done -> numbers of the newest regular checkpoints before the last step, candidates of `train.decide`. A
    state that is saved because of a signal is none of them, so that an interrupted run has the same candidates."""

    @classmethod
    def of(
        cls,
        run: Run,
        world: World,
        rotary: TunableRotary,
        optimizer: torch.optim.Optimizer,
        rows: tuple[RowSet, RowSet | None],
    ) -> "Progress":
        """The progress of a run on these training and validation rows."""
        return cls(run, world, rotary, optimizer, inputs_of(run, rows), TailAverage(run.recipe.train.steps))

    def resume(self) -> int:
        """Load the newest intact checkpoint, else the numbers of `rope.init`; returns the number of steps done.

        Raises:
            UserError: if the inputs of the run changed since the checkpoint was written.
        """
        state = latest_state(self.run.checkpoints, report=self.world.main)
        if state is None:
            self._begin()
            return 0
        check_inputs(state, self.inputs, self.run.folder)
        self.rotary.load_numbers(state.numbers)
        load_optimizer_tensors(self.optimizer, state.optimizer)
        self.average.sums = state.average
        for path in checkpoints(self.run.checkpoints):
            if (before := read_state(path)) is not None and before.step <= state.step:
                self._remember(before.step, before.numbers)
        return state.step

    def _remember(self, step: int, numbers: Tensors) -> None:
        train = self.run.recipe.train
        if step % train.checkpoint_every == 0 and step < train.steps:
            self.recent[step] = numbers
        for old in list(self.recent)[: -(train.keep_checkpoints - 1)]:
            del self.recent[old]

    def _begin(self) -> None:
        earlier = previous_run(self.run.recipe)
        if earlier is not None:
            self.rotary.load_numbers(earlier.numbers)
        if not self.world.main:
            return
        if earlier is not None:
            earlier.note(self.run.folder)
        else:  # left by a run with other settings that ended before its first checkpoint
            (self.run.folder / EARLIER).unlink(missing_ok=True)

    def save(self, step: int) -> None:
        """Save the state after `step` steps."""
        train, numbers = self.run.recipe.train, self.rotary.numbers()
        self._remember(step, numbers)
        if self.world.main:
            optimizer = optimizer_tensors(self.optimizer)
            state = State(step, numbers, optimizer, self.average.sums, self.inputs)
            save_state(self.run.checkpoints, state, train.keep_checkpoints, train.checkpoint_every)


def inputs_of(run: Run, rows: tuple[RowSet, RowSet | None]) -> dict[str, str]:
    """Name of an input of a run -> digest: the base's files, and the training and validation rows."""
    inputs = {**run.base.digests, "training documents": rows_digest(rows[0])}
    return inputs | ({"validation documents": rows_digest(rows[1])} if rows[1] is not None else {})


def check_finished(run: Run, rows: tuple[RowSet, RowSet | None]) -> None:
    """Check that a finished run was trained with this recipe and these rows.

    Raises:
        UserError: otherwise, with what differs.
    """
    check_folder(run)
    state = latest_state(run.checkpoints)
    if state is not None:
        check_inputs(state, inputs_of(run, rows), run.folder)


def facts_to_agree_on(progress: Progress, done: int) -> dict[str, object]:
    """The values on which all processes must agree at the start, by name; inputs and learned values as digests."""
    return {
        "recipe": progress.run.recipe.to_dict(),
        "learned values": hashlib.sha256(save(progress.rotary.numbers())).hexdigest(),
        "checkpoint": done,
        **progress.inputs,
    }


def rows_digest(rows: RowSet) -> str:
    """SHA-256 of the tokens of all rows."""
    tokens = hashlib.sha256()
    for row in rows.rows:
        tokens.update(row.input_ids.tobytes())
    return tokens.hexdigest()
