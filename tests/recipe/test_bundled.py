"""The bundled recipes and the files that they name; tests/test_distribution.py installs them from a wheel."""

from pathlib import Path

import pytest
from yarn_tune.cli.main import main
from yarn_tune.errors import UserError
from yarn_tune.recipe.bundled import copy_recipe, home, shipped_recipes

ROOT = Path(__file__).parents[2]


def test_all_recipes_are_listed(capsys):
    assert home() == ROOT
    assert main(["recipes"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    for path in (ROOT / "recipes").glob("*.yaml"):
        first = path.read_text().split("\n")[0].lstrip("# ")
        assert first.endswith("."), "the first line is a sentence"
        assert f"{path.stem} {first}" in " ".join(said.split())


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_copy_has_what_the_recipe_names(tmp_path, name):
    written = {path.relative_to(tmp_path) for path in copy_recipe(name, tmp_path)}
    assert Path(f"recipes/{name}.yaml") in written
    if name == "tiny-demo":
        assert {Path("data/tiny-base/model.safetensors"), Path("data/sample/heldout.jsonl.gz")} <= written
    if name.startswith("smollm2"):
        assert {Path("data/smollm2/prepare.py"), Path("data/public-domain/prepare.py")} <= written
    # Another recipe of the same documents may follow, but nothing of the user's is lost.
    assert {path.relative_to(tmp_path) for path in copy_recipe(name, tmp_path)} == written
    changed = tmp_path / "recipes" / f"{name}.yaml"
    changed.write_text("# mine\n")
    with pytest.raises(UserError, match=f"{name}.yaml: exists with other content; nothing was copied"):
        copy_recipe(name, tmp_path)
    assert changed.read_text() == "# mine\n"


def test_a_recipe_that_does_not_exist():
    with pytest.raises(UserError, match="there is no bundled recipe 'tiny'; choose one of command-r-256k, "):
        copy_recipe("tiny", Path())
