"""What comes with the package, from a wheel as from a checkout."""

import os
import subprocess
import sys
import zipfile
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
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert path.stem in said
        assert path.read_text().split("\n")[0].lstrip("# ") in said


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


def test_a_copy_has_the_recipe_it_learns_on_from(tmp_path):
    copy_recipe("smollm2-135m-16k", tmp_path)
    written = {path.relative_to(tmp_path) for path in copy_recipe("smollm2-135m-32k", tmp_path)}
    assert Path("recipes/smollm2-135m-32k-distill.yaml") in written


def test_a_recipe_that_does_not_exist():
    with pytest.raises(UserError, match="there is no bundled recipe 'tiny'; choose one of command-r-256k, "):
        copy_recipe("tiny", Path())


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel, installed into a folder of its own, without what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if "public-domain/" in name and name.endswith(".gz")]
    assert "yarn_tune/py.typed" in names
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def test_the_wheel_works_without_the_repository(installed, tmp_path):
    """The demo, from an empty folder: listed, copied, planned, learned for a step, exported."""

    def run(*words: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(installed)}
        command = [sys.executable, "-P", "-m", "yarn_tune", *words]
        said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert said.returncode == 0, said.stderr
        return said.stdout

    code = [sys.executable, "-P", "-c", "import yarn_tune; print(yarn_tune.__file__)"]
    where = subprocess.run(
        code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert where.stdout.startswith(str(installed))
    assert "tiny-demo" in run("recipes")
    run("recipes", "--copy", "tiny-demo")
    assert "1057 numbers" in run("plan", "recipes/tiny-demo.yaml")
    run("train", "recipes/tiny-demo.yaml", "train.steps=1", "train.batch_size=1", "train.micro_batch_size=1")
    run("export", "runs/tiny-demo")
    assert (tmp_path / "runs/tiny-demo/export/config.json").is_file()
