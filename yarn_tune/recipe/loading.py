"""A run, written down: YAML plus dotted overrides into the dataclasses of `sections.py`.

Every problem of a recipe is reported at once, each with its place (file and key), the value found and what to
write instead. Precedence: defaults < YAML < overrides (`train.steps=50`).
"""

import copy
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from .parsing import apply_override, build, show
from .schema import Recipe, Rope
from .validation import impossible, rope_checks, unmet


class RecipeError(UserError):
    """The user's recipe cannot be run as written; the message lists every problem found."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {problem}" for problem in problems)]))


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: the YAML file.
        overrides: `section.key=value` strings; values are YAML.

    Raises:
        RecipeError: with every problem found.
    """
    source = str(path)
    if not Path(path).is_file():
        raise RecipeError(source, ["no such file; `yarn-tune recipes` shows those that come with yarn_tune"])
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise RecipeError(source, [f"not readable as YAML: {where}"]) from error
    if not isinstance(tree, dict):
        raise RecipeError(source, [f"a recipe is a mapping of sections, found {show(tree)}"])
    tree.setdefault("name", Path(path).stem)
    return parse_recipe(tree, overrides or [], source)


def parse_recipe(tree: dict[str, Any], overrides: list[str], source: str = "recipe") -> Recipe:
    """Build and check a recipe from nested dicts; see `load_recipe`."""
    problems: list[str] = []
    tree = copy.deepcopy(tree)  # the caller's stays as it is
    for override in overrides:
        apply_override(tree, override, problems)
    recipe = build(Recipe, tree, "", problems)
    if recipe is not None:
        problems += impossible(recipe)
    if problems or recipe is None:
        raise RecipeError(source, problems)
    return recipe  # type: ignore[no-any-return]


def parse_rope(tree: dict[str, Any], source: str) -> Rope:
    """Build and check the `rope` section alone."""
    problems: list[str] = []
    rope = build(Rope, tree, "rope", problems)
    if rope is not None:
        problems += unmet(rope_checks(rope))
    if problems or rope is None:
        raise RecipeError(source, problems)
    return rope  # type: ignore[no-any-return]
