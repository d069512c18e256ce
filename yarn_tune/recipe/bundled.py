"""The bundled files: the recipes, the demo's model and documents, and scripts that fetch more.

In a checkout these files are beside the package, in a wheel inside it. Recipes name their files relative to the working
folder, so `copy_recipe` copies them there.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .loading import load_recipe

ADAPTERS = "adapters"
"""Folder in `recipes/` with what was learned with bundled recipes: `adapters/NAME/` with `NAME.yaml`."""


def home() -> Path:
    """The folder that holds `recipes/` and `data/`."""
    inside = Path(__file__).parents[1] / "shipped"
    return inside if inside.is_dir() else Path(__file__).parents[2]


def shipped_recipes() -> dict[str, str]:
    """Name -> first line of every bundled recipe."""
    found = sorted((home() / "recipes").glob("*.yaml"))
    return {path.stem: path.read_text(encoding="utf-8").split("\n")[0].lstrip("# ") for path in found}


@dataclass(frozen=True)
class PublishedSizes:
    """The keys of a base's config.json from which sizes are counted, as published on the hub."""

    source: str
    """Address of the config.json."""
    config: dict[str, Any]


def published_sizes(model: str) -> PublishedSizes | None:
    """The sizes of a base that a bundled recipe names; None for other models."""
    found = json.loads((home() / "recipes" / "bases.json").read_text(encoding="utf-8")).get(model)
    return None if found is None else PublishedSizes(found["source"], found["config"])


def copy_recipe(name: str, target: Path) -> list[Path]:
    """Copy a recipe and the bundled files that it names into `target`; returns their paths there.

    Recipes share documents and scripts, so identical files that exist already are kept.

    Raises:
        UserError: if there is no such recipe, or a different file of the same name exists. Nothing is copied then.
    """
    if name not in shipped_recipes():
        raise UserError(f"there is no bundled recipe {name!r}; choose one of {', '.join(shipped_recipes())}")
    files = _files_of(name)
    existing = [path for path in files if (target / path).exists()]
    if other := [str(target / path) for path in existing if not _same(home() / path, target / path)]:
        raise UserError(f"{', '.join(other)}: exists with other content; nothing was copied")
    for path in files:
        if path not in existing:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(home() / path, target / path)
    return [target / path for path in files]


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _files_of(name: str) -> list[Path]:
    """The files of a recipe and its adapter, relative to `home()`."""
    recipe = load_recipe(home() / "recipes" / f"{name}.yaml")
    named = [recipe.base.model, *recipe.data.named_files()]
    for command in (recipe.base.prepare, recipe.data.prepare):
        named += re.findall(r"\S+\.py", command or "")
    files = [Path("recipes") / f"{name}.yaml"]
    adapter = home() / "recipes" / ADAPTERS / name
    files += sorted(path.relative_to(home()) for path in adapter.rglob("*") if path.is_file())
    for place in map(Path, named):
        source = home() / place
        if not place.is_absolute() and source.exists():
            files += [f.relative_to(home()) for f in ([source] if source.is_file() else sorted(source.iterdir()))]
    return [file for file in dict.fromkeys(files) if (home() / file).is_file()]
