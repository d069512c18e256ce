"""Load a recipe: build the dataclasses of `schema.py` from YAML and dotted overrides, and check them.

Every problem of a recipe is reported at once, each with its place (file and key), the value found and what to
write instead. Precedence: defaults < YAML < overrides (`train.steps=50`).
"""

import copy
import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from ..errors import UserError
from .named_files import located, what_is
from .parsing import Findings, apply_override, build, read_yaml, show
from .schema import Recipe, Rope
from .validation import ROPE_RULES, RULES, broken_rules


class RecipeError(UserError):
    """The recipe cannot be run as written; the message lists every problem found."""

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
        raise RecipeError(source, [f"{_not_found(Path(path))}; `yarn-tune recipes` lists the bundled ones"])
    try:
        text = Path(path).read_text(encoding="utf-8")
        _check_checksum(source, text)
        tree = read_yaml(text)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        where = " ".join(str(error).split())
        described = "" if Path(path).suffix in (".yaml", ".yml") else f"; {what_is(Path(path))}"
        raise RecipeError(source, [f"not readable as YAML: {where[:300]}{described}"]) from error
    if not isinstance(tree, dict):
        raise RecipeError(source, [f"a recipe is a mapping of sections, found {show(tree)}"])
    tree.setdefault("name", Path(path).stem)
    recipe = parse_recipe(tree, overrides or [], source)
    data, folder = recipe.data, Path(path).parent
    train, validation, heldout, unlike = (
        [located(name, folder) for name in names or []]
        for names in (data.train, data.validation, data.heldout, data.heldout_unlike)
    )
    own = None if data.validation is None else validation
    return replace(recipe, data=replace(data, train=train, validation=own, heldout=heldout, heldout_unlike=unlike))


def _not_found(path: Path) -> str:
    """The message that a recipe does not exist, with the most similar name in its folder."""
    beside = [str(file) for file in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
    close = difflib.get_close_matches(str(path), [*beside, *(file.removesuffix(".yaml") for file in beside)], n=1)
    return f"no such file; did you mean {close[0].removesuffix('.yaml')}.yaml?" if close else "no such file"


def open_recipe(
    recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = (), folder: str | Path | None = None
) -> tuple[Recipe, Path]:
    """Read a recipe and determine its run folder.

    Args:
        recipe: a recipe's path, a run folder, the recipe as nested dicts, or one that was read already.
        overrides: `section.key=value` strings.
        folder: the run folder; None: the folder given as `recipe`, unless an override names another run, or
            `runs/<name>`.

    Raises:
        UserError: if there is no such recipe, or if it cannot be run, with every problem found.
    """
    if isinstance(recipe, (dict, Recipe)):
        read = parse_recipe(recipe, list(overrides)) if isinstance(recipe, dict) else recipe
        return read, Path(folder or Path("runs") / read.name)
    path = Path(recipe)
    if not path.is_dir():
        read = load_recipe(path, list(overrides))
        return read, Path(folder or Path("runs") / read.name)
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path} is not a run folder: it has no recipe.yaml; {what_is(path)}")
    kept = load_recipe(path / "recipe.yaml").name
    read = load_recipe(path / "recipe.yaml", list(overrides))
    return read, Path(folder or (path if read.name == kept else path.parent / read.name))


HEAD = "# sha256 of the lines below: "
CHECKSUM = re.compile(HEAD + r"[0-9a-f]{64}\n")


def checksum_line(text: str) -> str:
    """The first line of the recipe in a run folder; the lines below it must not change afterwards."""
    return f"{HEAD}{hashlib.sha256(text.encode()).hexdigest()}\n"


def _check_checksum(source: str, text: str) -> None:
    """Refuse a recipe of a run folder that changed since it was written."""
    head = CHECKSUM.match(text)
    broken = head is None and text.startswith(HEAD)
    if broken or (head and checksum_line(text[head.end() :]) != head[0]):
        remedy = "restore it, and pass other settings on the command line (key=value)"
        raise RecipeError(source, [f"changed since yarn-tune wrote it; {remedy}"])


def parse_recipe(tree: dict[str, Any], overrides: list[str], source: str = "recipe") -> Recipe:
    """Build and check a recipe from nested dicts; see `load_recipe`."""
    findings = Findings()
    tree = copy.deepcopy(tree)  # overrides are applied to the copy
    for override in overrides:
        apply_override(tree, override, findings)
    recipe = build(Recipe, tree, "", findings)
    if recipe is not None:
        findings.problems += broken_rules(ROPE_RULES, recipe.rope, findings.out_of_range, "rope.")
        findings.problems += broken_rules(RULES, recipe, findings.out_of_range)
    if findings.problems:
        raise RecipeError(source, findings.problems)
    return cast(Recipe, recipe)


SectionsT = TypeVar("SectionsT")


def parse_sections(kind: type[SectionsT], tree: dict[str, Any], overrides: list[str], source: str) -> SectionsT:
    """Build and check a dataclass of some of a recipe's sections.

    Args:
        kind: the dataclass; its `rope` is checked as that of a recipe.
        tree: the sections as nested dicts.
        overrides: `section.key=value` strings.
        source: named in errors.

    Raises:
        RecipeError: with every problem found.
    """
    findings = Findings()
    tree = copy.deepcopy(tree)  # overrides are applied to the copy
    for override in overrides:
        apply_override(tree, override, findings)
    made: Any = build(kind, tree, "", findings)
    if made is not None:
        findings.problems += broken_rules(ROPE_RULES, made.rope, findings.out_of_range, "rope.")
    if findings.problems:
        raise RecipeError(source, findings.problems)
    return cast(SectionsT, made)


def parse_rope(tree: dict[str, Any], source: str) -> Rope:
    """Build and check the `rope` section alone."""
    findings = Findings()
    rope = build(Rope, tree, "rope", findings)
    if rope is not None:
        findings.problems += broken_rules(ROPE_RULES, rope, findings.out_of_range, "rope.")
    if findings.problems:
        raise RecipeError(source, findings.problems)
    return cast(Rope, rope)
