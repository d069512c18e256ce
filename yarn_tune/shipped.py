"""What comes with the package beside its code: the recipes, the demo's model and documents, scripts that fetch more.

In a checkout they lie beside the package; a wheel carries them inside. Recipes name their files from the folder the
command is run in, so an installed package puts copies there.
"""

import re
import shutil
from pathlib import Path

from .errors import UserError
from .recipe import load_recipe


def home() -> Path:
    """The folder that holds `recipes/` and `data/`."""
    inside = Path(__file__).parent / "shipped"
    return inside if inside.is_dir() else Path(__file__).parents[1]


def shipped_recipes() -> dict[str, str]:
    """Name -> first line of every recipe that comes with the package."""
    found = sorted((home() / "recipes").glob("*.yaml"))
    return {path.stem: path.read_text(encoding="utf-8").split("\n")[0].lstrip("# ") for path in found}


def copy_recipe(name: str, target: Path) -> list[Path]:
    """Copy a recipe, and those of its files that come with the package, into `target`; returns what was written.

    Raises:
        UserError: if there is no such recipe, or a file of that name is there already.
    """
    if name not in shipped_recipes():
        raise UserError(f"no recipe {name!r} comes with yarn_tune; there are: {', '.join(shipped_recipes())}")
    recipe = load_recipe(home() / "recipes" / f"{name}.yaml")
    named = [recipe.base.model, *recipe.data.train, *recipe.data.heldout]
    for command in (recipe.base.prepare, recipe.data.prepare):
        named += re.findall(r"\S+\.py", command or "")
    files = [Path("recipes") / f"{name}.yaml"]
    for place in map(Path, named):
        source = home() / place
        if not place.is_absolute() and source.exists():
            files += [f.relative_to(home()) for f in ([source] if source.is_file() else sorted(source.iterdir()))]
    files = [file for file in dict.fromkeys(files) if (home() / file).is_file()]
    there = [str(target / file) for file in files if (target / file).exists()]
    if there:
        raise UserError(f"{', '.join(there)}: there already; nothing was copied")
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(home() / file, target / file)
    return [target / file for file in files]
