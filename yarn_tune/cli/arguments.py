"""Checks of a command's arguments, made before torch is imported."""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

from ..errors import UserError
from ..recipe import HUB, KINDS, Base, Recipe, StackName, is_hub_id, missing_files, open_recipe, recipe_keys, what_is

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


def numbers_of(place: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """Read a comma-separated list of finite numbers.

    Raises:
        UserError: if `text` is not such a list.
    """
    try:
        numbers = [kind(word) for word in text.split(",")]
        if all(map(math.isfinite, numbers)):
            return numbers
    except (ValueError, OverflowError):
        pass
    raise UserError(f"{place}: numbers with commas between them, as in 2,4,8; found {text!r}")


def open_run(options: argparse.Namespace, documents: bool = False) -> tuple[Recipe, Path]:
    """Read the recipe of a command and name its run folder.

    Args:
        options: with `recipe` (a recipe's path or a run folder) and `overrides`.
        documents: whether the command reads all documents, so that a missing one is an error now.

    Raises:
        UserError: if there is no such recipe, if it is impossible, or if a file that it names is missing.
    """
    recipe, folder = open_recipe(options.recipe, options.overrides)
    if documents:
        check_model("base.model", recipe.base.model, recipe.base.prepare)
        own = {"data.train": recipe.data.train, "data.validation": recipe.data.validation or []}
        for place, names in (own | recipe.data.heldout_files()).items():
            check_documents(place, names, recipe.data.prepare)
    return recipe, folder


def check_model(place: str, model: str, prepare: str | None = None) -> None:
    """Check that a model is a checkpoint folder, or may be a hub id.

    Raises:
        UserError: otherwise, with what it is instead.
    """
    model = os.path.expanduser(model)
    if is_hub_id(model) or (Path(model) / "config.json").is_file():
        return
    remedy = f"run `{prepare}` first" if prepare and not Path(model).exists() else what_is(Path(model))
    raise UserError(f"{place}: {model!r} is neither a checkpoint folder (with config.json) nor a hub id; {remedy}")


def check_revision(model: str, revision: str | None) -> None:
    """Check that only a hub id has a revision; raises `UserError` for a folder with one."""
    if revision is not None and Path(model).is_dir():
        raise UserError(f"--revision: {model} is a folder, which has no revisions; leave it out, or name the hub id")


def is_adapter_folder(path: str) -> bool:
    """Whether a path is a folder with an adapter and no checkpoint."""
    return (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file()


def tell_other_revision(place: Path, recorded: Base | None, used: Base) -> None:
    """Warn on stderr if numbers are used on another revision of the base than the one recorded beside them."""
    if recorded is not None and recorded.revision not in (None, used.revision):
        print(
            f"yarn-tune: WARNING: {place} records revision {recorded.revision} of {recorded.model}, and "
            f"{used.revision or 'another one'} is used: what was learned fits the recorded revision",
            file=sys.stderr,
        )


def check_row(path: Path) -> None:
    """Check that a path is a run folder or a checkpoint, as `compare` measures them.

    Raises:
        UserError: otherwise, with what it is instead.
    """
    if not (path / "recipe.yaml").is_file() and not (path / "config.json").is_file():
        raise UserError(
            f"{path} is neither a run folder (with recipe.yaml) nor a checkpoint (with config.json); {what_is(path)}"
        )


def check_picture(place: str, path: Path) -> None:
    """Check that a picture can be written, before anything is measured for it.

    Raises:
        UserError: if its folder does not exist, or the suffix is no picture format.
    """
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"{place}: the name must end in .png, .pdf or .svg; found {str(path)!r}")
    if not path.parent.is_dir():
        raise UserError(f"{place}: there is no folder {str(path.parent)!r}; create it first")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{place}: {str(path)!r} cannot be written; name another file")


def check_tokenizer(place: str, model: str) -> None:
    """Check that a checkpoint folder has a tokenizer; a hub id is not looked up.

    Raises:
        UserError: if it has none.
    """
    folder = Path(model)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{place}: {model} has no tokenizer; copy the tokenizer files of the model it was made from")


def check_documents(place: str, names: list[str], prepare: str | None = None) -> None:
    """Check that every document name matches a file; datasets on the hub are not looked up.

    Raises:
        UserError: with the first name that matches none.
    """
    for name in missing_files(names):
        if Path(name).is_dir():
            raise UserError(f"{place}: {name!r} is a folder without documents; known kinds: {', '.join(KINDS)}")
        remedy = f"run `{prepare}` first" if prepare else f"check the path (a dataset on the hub begins with {HUB})"
        folder = "" if Path(name).expanduser().is_absolute() else f" in {Path.cwd()} or beside the recipe"
        raise UserError(f"{place}: no file matches {name!r}{folder}; {remedy}")


def stacks_of(text: str, every: bool = False) -> list[str]:
    """Read a comma-separated list of serving stacks; `every` allows `all`.

    Raises:
        UserError: if a stack is unknown.
    """
    known = [*get_args(StackName), *(["all"] if every else [])]
    for name in (found := [word.strip() for word in text.split(",")]):
        if name not in known:
            raise UserError(f"--for: unknown stack {name!r}; {nearest(name, known)}")
    return found


def nearest(word: str, known: Iterable[str]) -> str:
    """Name the known word that is closest to a mistyped one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def unknown_flag(flag: str, value: str | None, flags: list[str]) -> str:
    """The message about a flag that a command does not have, with the recipe key or the flag that was meant."""
    name = flag.removeprefix("--").partition("=")[0]
    value = flag.partition("=")[2] or value or "..."
    plain = name.replace("-", "_")
    keys = [key.name for key in recipe_keys() if key.name == plain or key.name.rpartition(".")[2] == plain]
    if keys:
        return f"{flag}: settings of a recipe are given without dashes; did you mean {keys[0]}={value}?"
    return f"{flag}: unknown flag; {nearest('--' + name, flags)}"
