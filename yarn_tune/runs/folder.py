"""A run folder: where its files are, which recipe it belongs to, and the lock that one process holds on it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from ..distributed import World
from ..errors import UserError
from ..files import write_atomically
from ..models import BaseModel
from ..recipe import Recipe, load_recipe
from .checkpoint import LEARNED

RERUN_FREELY = ("eval", "export", "runtime")
"""Recipe sections that may change between the parts of an interrupted run."""


@dataclass(frozen=True)
class Run:
    """A run folder and its recipe."""

    recipe: Recipe
    folder: Path

    @cached_property
    def base(self) -> BaseModel:
        """The base model of the recipe, resolved once."""
        return BaseModel(self.recipe.base)

    @property
    def recipe_path(self) -> Path:
        """The recipe as run."""
        return self.folder / "recipe.yaml"

    @property
    def numbers_path(self) -> Path:
        """Where the learned offsets are, once training is done."""
        return self.folder / LEARNED

    @property
    def checkpoints(self) -> Path:
        """Folder of the saved states."""
        return self.folder / "checkpoints"


@contextmanager
def claimed(run: Run, world: World) -> Iterator[None]:
    """The run folder, with the recipe in it, while this start of the command is at work there.

    No other start may write into it meanwhile; a killed one leaves it free.

    Raises:
        UserError: if another is at work there, or the folder holds a run with other values.
    """
    if not world.main:
        check_folder(run)
        yield
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"{run.folder}: another process is learning there; wait for it, or give this run a name="
        ) from error
    try:
        claim_folder(run)
        yield
    finally:
        lock.release()


def claim_folder(run: Run) -> None:
    """Write the recipe into the run folder; raises as `check_folder` does."""
    check_folder(run)
    write_atomically(run.recipe_path, yaml.safe_dump(run.recipe.to_dict(), sort_keys=False).encode())


def check_folder(run: Run) -> None:
    """See that the folder is this very run's, if anything was learned in it.

    Raises:
        UserError: if it holds a run with other values.
    """
    if not (run.numbers_path.is_file() or any(run.checkpoints.glob("*"))):
        return
    changed = changes(run, [section for section in run.recipe.to_dict() if section not in RERUN_FREELY])
    if changed:
        raise UserError(
            f"{run.folder} holds a run with other values; give this one another name (name=...) or delete "
            "the folder:\n  " + "\n  ".join(changed)
        )


def changes(run: Run, sections: Sequence[str], begins: bool = True) -> list[str]:
    """In which of these sections the recipe is another than the one in the folder; "section: before -> now".

    Where the run has ended, it may no longer matter from what it `begins` (`rope.init`).
    """
    if not run.recipe_path.is_file():
        return []
    # Read as a recipe, so that settings which are newer than the run have their defaults.
    before, now = load_recipe(run.recipe_path).to_dict(), run.recipe.to_dict()
    if not begins:
        now["rope"]["init"] = before["rope"]["init"]
    return [f"{each}: {before[each]} -> {now[each]}" for each in sections if before[each] != now[each]]
