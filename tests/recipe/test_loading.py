"""Recipes: every problem at once, with place, value and remedy."""

import copy

import pytest
import yaml
from yarn_tune.recipe.loading import RecipeError, load_recipe, parse_recipe
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
    assert recipe.train.rates() == Rates(frequency=1e-3, temperature=1e-3, gain=1e-3, phase=1e-3, lora=1e-3)
    assert (recipe.row_tokens(), recipe.rows()) == (1024, 50 * 4)
    assert parse_recipe(recipe.to_dict(), []) == recipe


def test_rates_by_kind():
    recipe = parse_recipe(copy.deepcopy(GOOD), ["train.learning_rate.frequency=0.5"])
    assert recipe.train.rates() == Rates(frequency=0.5, gain=0.03)
    by_rung = [recipe.train.rates(rung).gain for rung in ("layer", "head", "pair", "pair_phase")]
    assert by_rung == [0.01, 0.02, 0.03, 0.03]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.step=5", "train.step: unknown key; did you mean 'steps'?"),
        ("nonsense.key=5", "nonsense: unknown key; known keys: name, base, rope"),
        ("train.steps=many", "train.steps: must be a whole number; found 'many'"),
        ("train.steps=1.5", "train.steps: must be a whole number; found 1.5"),
        ("train.steps=true", "train.steps: must be a whole number; found True"),
        ("train.clip=.inf", "train.clip: must be a finite number; found inf"),
        ("train.steps=0", "train.steps: at least 1; found 0"),
        ("train.gradient_checkpointing={}", "train.gradient_checkpointing: must be true or false; found {}"),
        ("runtime.zero=1", "runtime.zero: must be one of 0, 3; found 1 (stages 1 and 2 shard optimizer state"),
        ("train.micro_batch_size=3", "train.micro_batch_size: must divide train.batch_size (4); found 3"),
        ("rope.factor=0.5", "rope.factor: a factor below 1 shrinks; found 0.5"),
        ("rope.native=2048", "rope.native: the native window must be between 2 and rope.window (1024)"),
        ("rope.beta_fast=0.5", "rope.beta_fast: must exceed rope.beta_slow (1.0); are the betas swapped?"),
        ("rope.frequencies=all", "rope.frequencies: must be one of fixed, scale, ramp, per_pair; found 'all'"),
        ("data.train=[]", "data.train: no documents"),
        ("data.train=a.txt", "data.train: must be a list, as in [a.txt]; found 'a.txt'"),
        ("data.heldout=[a.txt]", "data.heldout: stands in data.train too"),
        ("data.row_tokens=4096", "data.row_tokens: a row cannot be longer than rope.window (1024)"),
        ("eval.lengths=[2048]", "eval.lengths: lengths from 2 to rope.window (1024)"),
        ("name=a/b", "name: a plain folder name; found 'a/b'"),
        ("train.learning_rate.frequency=-1", "train.learning_rate.frequency: must be positive"),
        ("train.steps", "write it as section.key=value"),
        ("train.steps=[1", "the value is not readable as YAML"),
        ("base=5", "base: expected a mapping, found 5"),
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
