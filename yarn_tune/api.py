"""The commands as a Python class: one run, from its plan to a verified checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .evaluation import Comparison, compare, named_rows
from .export import export
from .planning import Plan, plan
from .recipe import Recipe, open_recipe
from .runs import Run, latest_state
from .serving import Verification, verify
from .training import train
from .tunable import Learned


class Tuning:
    """A run and its folder. Every method does what the command of the same name does, and continues an interrupted run.

    Args:
        recipe: a recipe's path, a run folder, the recipe as nested dicts, or a `Recipe`, to which no overrides apply.
        overrides: settings, as in `"train.steps=50"`.
        folder: the run folder; by default the folder given as `recipe`, unless an override names another run, or
            `runs/<name>`.

    Raises:
        UserError: if there is no such recipe, or if it is impossible, with every problem found.
    """

    def __init__(
        self,
        recipe: str | Path | dict[str, Any] | Recipe,
        overrides: Sequence[str] = (),
        folder: str | Path | None = None,
    ) -> None:
        self.run = Run(*open_recipe(recipe, overrides, folder))

    def plan(self) -> Plan:
        """Return what the run will read, cover and cost; `.text()` formats it. Trains nothing."""
        return plan(self.run.recipe, self.run.base, latest_state(self.run.checkpoints) is not None)

    def train(self) -> Learned:
        """Train; raises `Interrupted` after SIGTERM or SIGINT, with the finished step saved."""
        return train(self.run)

    def compare(self, others: Sequence[str | Path] = ()) -> Comparison:
        """Measure every method, and other runs and checkpoints, on the same held-out tokens."""
        return compare(self.run, *named_rows(self.run, [Path(other) for other in others]))

    def export(self, anyway: bool = False) -> Path:
        """Write the checkpoint to serve, and its card; raises `CheckFailed` if its logits are not the tuned model's.

        A run that learned nothing better than search-free YaRN (`train.decide`) is exported only with `anyway`.
        """
        return export(self.run, anyway)

    def verify(self) -> Verification:
        """Check what each serving stack computes from the export; `.passed`, `.text()`."""
        return verify(str(self.run.folder / "export"), self.run.recipe.export.stacks)
