"""Recipes: every problem at once, with place, value and remedy."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from yarn_tune.cli.arguments import check_model
from yarn_tune.recipe.loading import RecipeError, load_recipe, parse_recipe
from yarn_tune.recipe.named_files import matching_files
from yarn_tune.recipe.schema import Rates

GOOD = {
    "name": "good",
    "base": {"model": "somewhere"},
    "rope": {"window": 1024},
    "data": {"train": ["a.txt"], "heldout": ["b.txt"]},
}


def problems(*overrides: str, **sections: object) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(copy.deepcopy(GOOD) | sections, list(overrides), "r.yaml")
    assert str(caught.value).startswith("r.yaml: ")
    return caught.value.problems


def test_defaults_and_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in GOOD.items() if k != "name"}))
    recipe = load_recipe(
        path, ["train.steps=50", "train.learning_rate=1e-3", "rope.frequencies=scale", "data.rows=null"]
    )
    assert recipe.name == "mine"
    assert (recipe.train.steps, recipe.rope.frequencies, recipe.data.rows) == (50, "scale", None)
    assert recipe.train.learning_rate == 1e-3
    assert (recipe.row_tokens(), recipe.rows()) == (1024, 50 * 4)
    assert parse_recipe(recipe.to_dict(), []) == recipe


def test_rates_by_kind():
    recipe = parse_recipe(copy.deepcopy(GOOD), ["train.learning_rate.frequency=0.5"])
    assert recipe.train.learning_rate == Rates(frequency=0.5)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.step=5", "train.step: unknown key; did you mean 'steps'?"),
        ("nonsense.key=5", "nonsense: unknown key; known keys: name, base, rope"),
        ("train.steps=many", "train.steps: must be a whole number; found 'many'"),
        ("train.steps=1.5", "train.steps: must be a whole number; found 1.5"),
        ("train.steps=true", "train.steps: must be a whole number; found True"),
        ("train.clip=.inf", "train.clip: must be a finite number; found inf"),
        ("train.steps=0", "train.steps: must be at least 1; found 0"),
        ("train.gradient_checkpointing={}", "train.gradient_checkpointing: must be true or false; found {}"),
        ("runtime.zero=1", "runtime.zero: must be one of 0, 3; found 1 (stages 1 and 2 shard gradients and optimizer"),
        ("train.micro_batch_size=3", "train.micro_batch_size: must divide train.batch_size (4); found 3"),
        ("rope.factor=0.5", "rope.factor: must be at least 1; found 0.5 (a smaller factor would shrink the window)"),
        (
            "rope.native=2048",
            "rope.native: the native window must not exceed rope.window (1024); this tool only extends",
        ),
        ("rope.beta_fast=0.5", "rope.beta_fast: must exceed rope.beta_slow (1.0); are the betas swapped?"),
        ("rope.frequencies=all", "rope.frequencies: must be one of fixed, scale, ramp, per_pair; found 'all'"),
        ("data.train=[]", "data.train: must not be empty; found [] (name at least one file)"),
        ("data.train=a.txt", "data.train: must be a list, as in [a.txt]; found 'a.txt'"),
        ("data.heldout=[a.txt]", "data.heldout: a document of data.train is listed here too"),
        ("data.row_tokens=4096", "data.row_tokens: a row cannot be longer than rope.window (1024)"),
        ("eval.lengths=[2048]", "eval.lengths: a length must not exceed rope.window (1024); found [2048]"),
        ("eval.lengths=[512, 1]", "eval.lengths[1]: must be at least 2; found 1"),
        (
            "eval.retrieval={depths: [0.5, 1.5]}",
            "eval.retrieval.depths[1]: must be at least 0 and at most 1; found 1.5",
        ),
        ("eval.retrieval={lengths: [2000]}", "eval.retrieval.lengths: a length must not exceed rope.window (1024)"),
        ("train.warmup=1", "train.warmup: must be at least 0 and less than 1; found 1.0"),
        ("train.learning_rate=0", "train.learning_rate: must be greater than 0; found 0.0"),
        ("name=a/b", "name: must be a folder name of at most 200 bytes, without slashes"),
        ("train.learning_rate.frequency=-1", "train.learning_rate.frequency: must be greater than 0; found -1.0"),
        ("train.steps", "write it as section.key=value"),
        ("train.steps=[1", "the value is not readable as YAML"),
        ("base=5", "base: must be a mapping; found 5"),
    ],
)
def test_each_mistake_names_place_value_and_remedy(override, expected):
    (problem,) = problems(override)
    assert expected in problem


def test_what_checkpointed_layers_keep_needs_checkpointing():
    for key in ("train.keep_attention", "train.offload_activations"):
        (problem,) = problems(f"{key}=true", "train.gradient_checkpointing=false")
        assert problem.startswith(f"{key}: ")
        assert "set train.gradient_checkpointing to true" in problem


def test_all_problems_at_once():
    found = problems("train.steps=0", "rope.factor=0.1", "train.clip=-1", "eval.documents=0")
    assert len(found) == 4
    found = problems(
        "train.batch_size=0", "train.micro_batch_size=3", "rope.window=1", "runtime.fsdp=true", "runtime.zero=3"
    )
    # Rules that read a value outside its range are skipped; the others are still checked.
    assert [problem.split(": ")[0] for problem in found] == ["rope.window", "train.batch_size", "runtime.fsdp"]
    found = problems("train.stpes=1", "rope.window=big", base={})
    assert [problem.split(":")[0] for problem in found] == ["base.model", "rope.window", "train.stpes"]


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "missing.yaml")
    for content, message in (
        (b"a: [1", "not readable as YAML"),
        (b"- 1", "mapping of sections"),
        (b"\xff\xfe", "not"),
    ):
        path = tmp_path / "bad.yaml"
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)


def test_reading_a_recipe_imports_no_torch():
    code = (
        "import sys, yarn_tune.recipe as recipe; recipe.load_recipe('recipes/tiny-demo.yaml');"
        "print(sorted({'torch', 'transformers', 'numpy', 'accelerate'} & {*sys.modules}))"
    )
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_validation_documents_are_found_beside_the_recipe(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("text")
    path, own = tmp_path / "made.yaml", {"train": ["a.txt"], "heldout": ["b.txt"], "validation": ["c.txt"]}
    path.write_text(yaml.safe_dump(GOOD | {"data": own, "train": {"decide": True}}))
    data = load_recipe(path).data
    found = [*data.train, *data.heldout, *data.validation]
    assert found == [str(tmp_path / f"{name}.txt") for name in "abc"]


def test_a_folder_with_links_to_itself_is_read_once(tmp_path):
    (tmp_path / "docs" / "inner").mkdir(parents=True)
    (tmp_path / "docs" / ".hidden").mkdir()
    for name in ("a.txt", "inner/b.txt", ".hidden/c.txt", ".d.txt"):
        (tmp_path / "docs" / name).write_text("text")
    for name in ("one", "inner/two"):
        (tmp_path / "docs" / name).symlink_to(tmp_path / "docs")
    found = matching_files(str(tmp_path / "docs"))
    assert found == [str(tmp_path / "docs" / name) for name in ("a.txt", "inner/b.txt")]


def test_the_home_folder_in_a_name_of_a_base(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = parse_recipe(GOOD | {"base": {"model": "~/models/base"}}, [])
    assert recipe.base.model == str(tmp_path / "models" / "base")
    assert parse_recipe(GOOD, ["base.model=~/other"]).base.model == str(tmp_path / "other")
    assert parse_recipe(GOOD, ["base.model=org/na~me"]).base.model == "org/na~me"
    with pytest.raises(RecipeError, match="base.model: must be text"):
        parse_recipe(GOOD, ["base.model=3"])
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "base" / "config.json").write_text("{}")
    check_model("CHECKPOINT", "~/models/base")
