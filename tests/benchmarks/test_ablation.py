"""The table of benchmarks/ablation.py: its values are those of the comparison, and old results keep their columns."""

import sys
from pathlib import Path

import pytest
from tiny import recipe_tree, save_tiny, write_documents
from yarn_tune.evaluation import compare, named_rows
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.runs.folder import Run
from yarn_tune.training.loop import train

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import ablation  # noqa: E402


def test_a_line_holds_what_was_measured(tmp_path):
    tree = recipe_tree(save_tiny(tmp_path / "base"), tmp_path)
    tree["data"]["heldout_unlike"] = [str(write_documents(tmp_path / "unlike.jsonl", [400, 300], seed=90))]
    settings = ["rope.query_gains=layer", "eval.native_adapted=true", "data.packing=long"]
    run = Run(parse_recipe(tree, settings), tmp_path / "run")
    train(run)
    comparison = compare(run, named_rows(run, [])[0], only=ablation.MEASURED)
    found = ablation.figures(run, comparison)
    like, unlike = comparison.like, comparison.unlike
    assert found["nll"] == like.row("tuned").nll[256]
    assert found["own_slid"] == like.row("tuned-slid").nll[256]
    assert found["control"] == like.row("native-adapted").nll[256]
    assert found["slid"] == like.row("native-window").nll[256]
    assert (found["unlike"], found["yarn_unlike"]) == (unlike.row("tuned").nll[256], unlike.row("yarn").nll[256])
    lines = ablation.table({"+ layer": [found, found | {"nll": found["nll"] + 0.02}]}).splitlines()
    titles = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    assert titles[2:6] == ["NLL", "unlike", "own slid", "control"]
    assert f"| + layer | 12 | {found['nll'] + 0.01:.3f} ± 0.010 | {found['unlike']:.3f} ± 0.000 |" in lines[4]
    assert all(len(line.split("|")) == len(titles) + 2 for line in lines)


def test_columns_that_were_not_measured_are_left_out():
    old = {"numbers": 2, "nll": 3.0, "yarn": 3.2, "slid": 3.1, "closed": 2.0, "tax": 0.1, "yarn_tax": 0.2,
           "retrieved": 0.5, "yarn_retrieved": 0.7, "cost": 2.66}  # fmt: skip
    assert ablation.table({"x": [old]}).splitlines() == [
        "| learned, how | numbers | NLL | gap closed | short tax | retrieved | cost |",
        "|---|---|---|---|---|---|---|",
        "| nothing: search-free YaRN | 0 | 3.200 | 0% | +0.200 | 70% | |",
        "| nothing: native window, slid | 0 | 3.100 | 100% | +0.000 | | |",
        "| x | 2 | 3.000 | 200% | +0.100 | 50% | 2.7 |",
    ]


@pytest.mark.parametrize("name", ablation.LINES)
def test_every_line_is_a_valid_recipe(name):
    recipe = Path(__file__).parents[2] / "recipes" / "tiny-demo.yaml"
    ablation.load_recipe(recipe, [*ablation.SMALL, *ablation.LINES[name], "name=line"])
