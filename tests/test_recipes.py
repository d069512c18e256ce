"""Every recipe: valid, planned in seconds, and run for two steps on a shrunken model of its family."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import NATIVE, save_tiny, write_documents
from yarn_tune.cli import main
from yarn_tune.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FAMILY = {"tiny": "llama", "smollm2": "llama", "llama": "llama", "mistral": "mistral", "qwen2.5": "qwen2"}


def test_all_recipes_are_found_and_listed():
    assert len(RECIPES) == 6
    listed = (ROOT / "recipes" / "README.md").read_text()
    for path in RECIPES:
        assert f"`{path.name}`" in listed


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_a_page_one_can_run(path):
    load_recipe(path)
    header = path.read_text().split("base:")[0]
    assert f"recipes/{path.name}" in header or path.stem == "tiny-demo"
    assert "Needs:" in header
    assert "million tokens" in header


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_plan_answers(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["plan", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["coverage"]["untrained"] == 0
    recipe = load_recipe(path)
    reads = recipe.train.steps * recipe.train.batch_rows * recipe.row_tokens()
    assert (
        f"Reads {reads / 1e6:.1f} million tokens" in path.read_text() or f"Reads {reads / 1e6:.2f}" in path.read_text()
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_two_steps_on_a_shrunken_model(path, tmp_path, monkeypatch, capsys):
    """The recipe as it is, but for a small random model of the family, small windows and local documents."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    base = save_tiny(tmp_path / "base", FAMILY[path.stem.split("-")[0]])
    window = NATIVE * recipe.rope.window // (recipe.rope.native or 8192) if path.stem != "tiny-demo" else 512
    tree = yaml.safe_load(path.read_text())
    tree["base"]["model"] = str(base)
    tree["rope"] |= {"window": window, "native": NATIVE}
    tree["data"] |= {
        "train": [str(write_documents(tmp_path / "train.jsonl", [window * 9], ids=True))],
        "heldout": [str(write_documents(tmp_path / "heldout.jsonl", [window * 2], seed=5, ids=True))],
    }
    tree["train"] |= {"steps": 2}
    tree["eval"] = {"documents": 1}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))
    assert main(["run", "small.yaml", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in result["rows"]][-1] == "tuned"
    run = tmp_path / "runs" / "small"
    for name in (
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "compare.json",
        "report.md",
        "nll_by_position.png",
    ):
        assert (run / name).is_file()
    assert (run / "export" / "config.json").is_file()
    assert result["serve"] == f"vllm serve runs/small/export --max-model-len {window}"
