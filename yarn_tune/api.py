"""The commands as a Python object: one run, from its plan to a checked checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .evaluation import Comparison, compare, named_rows
from .export import export, write_card
from .planning import Plan, plan
from .recipe import open_recipe
from .runs import Run, latest_state
from .serving import Verification, verify
from .training import train
from .tunable import Learned


class Tuning:
    """A run and its folder; every method does what the command of its name does, and continues what is there.

    Args:
        recipe: a recipe's path, a run folder, or the recipe itself as nested dicts.
        overrides: settings, as `"train.steps=50"`.
        folder: where the run goes; by default that of a run folder, unless overrides name another, or `runs/<name>`.

    Raises:
        UserError: if there is no such recipe, or it is impossible, with every problem found.
    """

    def __init__(
        self, recipe: str | Path | dict[str, Any], overrides: Sequence[str] = (), folder: str | Path | None = None
    ) -> None:
        self.run = Run(*open_recipe(recipe, overrides, folder))

    def plan(self) -> Plan:
        """What it will read, cover and cost; `.text()` says it in words. Trains nothing."""
        return plan(self.run.recipe, latest_state(self.run.checkpoints) is not None)

    def train(self) -> Learned:
        """Learn; raises `Interrupted` at a signal, after saving."""
        return train(self.run)

    def compare(self, others: Sequence[str | Path] = ()) -> Comparison:
        """Every method, and other runs and checkpoints, on the same held-out tokens."""
        return compare(self.run, *named_rows(self.run, [Path(other) for other in others]))

    def export(self) -> Path:
        """The checkpoint to serve, with its card; raises `CheckFailed` if it does not compute what was learned."""
        path = export(self.run)
        write_card(self.run, path)
        return path

    def verify(self) -> Verification:
        """What each serving stack will make of the export; `.passed`, `.text()`."""
        return verify(str(self.run.folder / "export"), self.run.recipe.export.stacks)
