"""A run folder: the paths in it, the recipe it belongs to, and the lock that one process holds."""

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ..adapter import AdapterSections, read_sections
from ..errors import UserError
from ..files import locked, write_atomically
from ..models import BaseModel
from ..recipe import Base, Recipe, checksum_line, load_recipe
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
    def sections(self) -> Recipe:
        """The sections that define what the numbers mean and how they are served; an `AdapterRun` has only these."""
        return self.recipe

    @property
    def recipe_path(self) -> Path:
        """The recipe of the run, with all defaults written out."""
        return self.folder / "recipe.yaml"

    @property
    def numbers_path(self) -> Path:
        """The learned offsets, once training is done."""
        return self.folder / LEARNED

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"


@dataclass(frozen=True)
class AdapterRun:
    """An adapter that is used like a finished run."""

    sections: AdapterSections
    folder: Path

    @cached_property
    def base(self) -> BaseModel:
        """The base model that the adapter names, resolved once."""
        return BaseModel(self.sections.base)


def recorded_base(run: Run | AdapterRun) -> Base | None:
    """The base that the files of a run or adapter name; None where there are none."""
    if isinstance(run, AdapterRun):
        return read_sections(run.folder).base
    return load_recipe(run.recipe_path).base if run.recipe_path.is_file() else None


@contextmanager
def claimed(run: Run, main: bool = True) -> Iterator[None]:
    """Hold the lock of the run folder, and write the recipe into it.

    Args:
        run: the run whose folder is locked.
        main: whether this process writes; other processes only check the folder.

    Raises:
        UserError: if another process writes there, or the folder holds a run with other values.
    """
    if not main:
        check_folder(run)
        yield
        return
    with locked(run.folder):
        claim_folder(run)
        yield


def claim_folder(run: Run) -> None:
    """Write the recipe into the run folder; raises as `check_folder` does."""
    check_folder(run)
    text = yaml.safe_dump(run.recipe.to_dict(), sort_keys=False)
    write_atomically(run.recipe_path, (checksum_line(text) + text).encode())


def check_folder(run: Run) -> None:
    """Check that what was learned in the folder, if anything, was learned with this recipe.

    Raises:
        UserError: if it holds a run with other values.
    """
    if not (run.numbers_path.is_file() or any(run.checkpoints.glob("*"))):
        return
    changed = changes(run, [section for section in run.recipe.to_dict() if section not in RERUN_FREELY])
    if changed:
        if run.numbers_path.is_file() and len(changed) == 1 and changed[0].startswith("train.steps: "):
            done = load_recipe(run.recipe_path).train.steps
            if run.recipe.train.steps > done:
                raise UserError(longer_text(run, done))
        raise UserError(
            f"{run.folder} holds a run with other values; give this one another name (name=...) or delete "
            "the folder:\n  " + "\n  ".join(changed)
        )


def longer_text(run: Run, done: int) -> str:
    """The message about a finished run that is to be longer, with the command that continues from its numbers."""
    name, more = f"{run.folder.name}-{run.recipe.train.steps}", run.recipe.train.steps - done
    settings = [
        f"name={name}",
        f"rope.init={run.folder}",
        f"train.steps={more}",
        f"train.seed={run.recipe.train.seed + 1}",
    ]
    command = shlex.join(["yarn-tune", "train", str(run.folder), *settings])
    return (
        f"{run.folder} is complete after {done} steps, and its learning rates were made for {done}; train {more} more "
        f"as another run, which starts from its numbers (rope.init) and reads other rows (train.seed):\n  {command}"
    )


def changes(run: Run, sections: Sequence[str], begins: bool = True) -> list[str]:
    """The keys in which the recipe differs from the one in the folder, as "section.key: before -> now".

    Args:
        run: the run whose recipe is compared with the one in its folder.
        sections: names of the sections to compare.
        begins: whether the folder in `rope.init` is compared; after the end of a run it has no effect any more. The
            method that numbers are offsets from always is.
    """
    if not run.recipe_path.is_file():
        return []
    # Loaded as a recipe, so that settings which are newer than the run have their defaults.
    try:
        earlier = load_recipe(run.recipe_path)
    except UserError as error:
        raise UserError(
            f"{run.folder} holds a run whose recipe cannot be read, perhaps one of an earlier yarn-tune; give this one "
            f"another name (name=...), or delete the folder. {error}"
        ) from error
    before, now = earlier.to_dict(), run.recipe.to_dict()
    if not begins and earlier.rope.method == run.recipe.rope.method:
        now["rope"]["init"] = before["rope"]["init"]
    return [text for each in sections for text in _differences(each, before[each], now[each])]


def _differences(key: str, before: Any, now: Any) -> Iterator[str]:
    """The keys at and below `key` with other values, as "key: before -> now"."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            yield from _differences(f"{key}.{name}", before.get(name), now.get(name))
    elif before != now:
        yield f"{key}: {json.dumps(before)} -> {json.dumps(now)}"
