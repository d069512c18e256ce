"""What comes with the package beside its code: the recipes, the demo's model and documents, scripts that fetch more.

In a checkout they lie beside the package; a wheel carries them inside. Recipes name their files from the folder the
command is run in, so an installed package puts copies there.
"""

import re
import shutil
from pathlib import Path

from ..errors import UserError
from .loading import load_recipe


def home() -> Path:
    """The folder that holds `recipes/` and `data/`."""
    inside = Path(__file__).parents[1] / "shipped"
    return inside if inside.is_dir() else Path(__file__).parents[2]


def shipped_recipes() -> dict[str, str]:
    """Name -> first line of every recipe that comes with the package."""
    found = sorted((home() / "recipes").glob("*.yaml"))
    return {path.stem: path.read_text(encoding="utf-8").split("\n")[0].lstrip("# ") for path in found}


def copy_recipe(name: str, target: Path) -> list[Path]:
    """Copy a recipe, and those of its files that come with the package, into `target`; returns the files of it there.

    Files that are there already, byte for byte, stay: recipes share documents and scripts.

    Raises:
        UserError: if there is no such recipe, or another file of that name is there already.
    """
    if name not in shipped_recipes():
        raise UserError(f"no recipe {name!r} comes with yarn_tune; there are: {', '.join(shipped_recipes())}")
    files = _files_of(name)
    there = [path for path in files if (target / path).exists()]
    if other := [str(target / path) for path in there if not _same(home() / path, target / path)]:
        raise UserError(f"{', '.join(other)}: there already, and not the same; nothing was copied")
    for path in files:
        if path not in there:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(home() / path, target / path)
    return [target / path for path in files]


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _files_of(name: str) -> list[Path]:
    """A recipe, that of the earlier run it learns on from, and their files; from `home()`."""
    recipe = load_recipe(home() / "recipes" / f"{name}.yaml")
    named = [recipe.base.model, *recipe.data.named_files()]
    for command in (recipe.base.prepare, recipe.data.prepare):
        named += re.findall(r"\S+\.py", command or "")
    files = [Path("recipes") / f"{name}.yaml"]
    for place in map(Path, named):
        source = home() / place
        if not place.is_absolute() and source.exists():
            files += [f.relative_to(home()) for f in ([source] if source.is_file() else sorted(source.iterdir()))]
    if (earlier := Path(recipe.rope.init).name) in shipped_recipes():
        files += _files_of(earlier)
    return [file for file in dict.fromkeys(files) if (home() / file).is_file()]
