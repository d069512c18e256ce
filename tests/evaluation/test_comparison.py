"""The comparison: same tokens for every method, each the method it says it is."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny import NATIVE, recipe_tree, save_tiny, tiny_config
from transformers import AutoModelForCausalLM
from yarn_tune.data import heldout
from yarn_tune.data.heldout import heldout_excerpts
from yarn_tune.errors import UserError
from yarn_tune.evaluation import recall
from yarn_tune.evaluation.comparison import compare, named_rows
from yarn_tune.evaluation.perplexity import full_nats
from yarn_tune.evaluation.results import SEARCH_FREE, Comparison, Row, key_tokens, table
from yarn_tune.models import loading as models
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.recipe.schema import Recipe, Retrieve
from yarn_tune.runs.folder import Run
from yarn_tune.runs.learned import tuned_row
from yarn_tune.training.loop import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    base = save_tiny(folder / "base")
    run = Run(parse_recipe(recipe_tree(base, folder), []), folder / "run")
    train(run)
    return run, compare(run, {"tuned": tuned_row(run)})


def test_methods_and_figures(finished):
    run, comparison = finished
    names = [row.method for row in comparison.rows]
    assert names == ["none", "native-window", "linear", "ntk", "dynamic", "yarn", "tuned"]
    assert tuple(names[:-1]) == SEARCH_FREE
    assert comparison.edges == [32 * i for i in range(9)]
    for row in comparison.rows:
        assert set(row.nll) == {NATIVE, 2 * NATIVE, 256}
        # Buckets hold 32 tokens each but the first, which lacks the token nothing predicts.
        weights = [31, *[32] * 7]
        mean = sum(w * v for w, v in zip(weights, row.by_position, strict=True)) / 255
        assert mean == pytest.approx(row.nll[256], rel=1e-9)
        assert len(row.by_excerpt) == len(comparison.excerpts)
        assert sum(row.by_excerpt) / len(row.by_excerpt) == pytest.approx(row.nll[256], rel=1e-9)
        assert row.tokens_spent == (4 * 2 * 256 if row.method == "tuned" else 0)
    saved = json.loads((run.folder / "compare.json").read_text())
    assert [row["method"] for row in saved] == names
    assert {"method", "nll", "by_position", "short_nll", "tokens_spent", "seconds"} <= set(saved[0])


@pytest.mark.rope_warnings
@pytest.mark.parametrize("method", ["none", "linear", "dynamic", "yarn"])
def test_each_method_equals_transformers_own(finished, method):
    """The same documents through a stock model whose config names the method."""
    run, comparison = finished
    section = {"rope_theta": 10000.0}
    length = 256
    if method == "none":
        section |= {"rope_type": "default"}
    elif method == "yarn":
        section |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": NATIVE}
    else:
        section |= {"rope_type": method, "factor": 4.0}
    config = tiny_config("llama", rope_parameters=section)
    config.max_position_embeddings = NATIVE
    model = AutoModelForCausalLM.from_pretrained(run.recipe.base.model, config=config).eval()
    excerpts = heldout_excerpts(run.recipe.data, run.base, length, 2)
    nats = [full_nats(model, ids) for _, ids in excerpts]
    expected = torch.cat(nats).double().mean().item()
    # `dynamic` reads length - 1 tokens (the last is only predicted), as the harness does.
    assert comparison.row(method).nll[256] == pytest.approx(expected, rel=1e-5)


def test_the_slid_window_inside_the_native_one_is_the_base(finished):
    _, comparison = finished
    assert comparison.row("native-window").short_nll == pytest.approx(comparison.row("none").short_nll, rel=1e-6)
    assert comparison.row("dynamic").short_nll == pytest.approx(comparison.row("none").short_nll, rel=1e-6)


def test_what_was_measured_is_not_measured_again(finished, monkeypatch):
    run, comparison = finished
    monkeypatch.setattr("yarn_tune.evaluation.methods.load_model", None)
    assert compare(run, {"tuned": tuned_row(run)}) == comparison
    longer = Run(parse_recipe(run.recipe.to_dict(), ["eval.lengths=[200]"]), run.folder)
    with pytest.raises(TypeError):
        compare(longer, {"tuned": tuned_row(run)})


def test_lengths_are_the_native_window_doubled_up_to_the_window():
    assert heldout.doubled(64, 256) == [64, 128, 256]
    assert heldout.doubled(64, 300) == [64, 128, 256, 300]
    assert heldout.grid_lengths(Retrieve(), 64, 300) == [48, 112, 240, 284]
    assert heldout.grid_lengths(Retrieve(), 64, 64) == [48]
    assert heldout.grid_lengths(Retrieve(lengths=[200, 100, 200]), 64, 300) == [100, 200]


def test_half_a_comparison_leaves_no_file(finished, tmp_path, monkeypatch):
    """An export's card reads compare.json, and counts on every method."""
    run, comparison = finished
    tuned, other = {"tuned": tuned_row(run)}, Run(run.recipe, tmp_path)
    shutil.copytree(run.folder / "nats", tmp_path / "nats")
    assert compare(other, tuned, only=["none", "tuned"]).rows == [comparison.row("none"), comparison.row("tuned")]
    assert not (tmp_path / "compare.json").exists()
    monkeypatch.setattr("yarn_tune.evaluation.comparison.ntk_inv_freq", lambda *numbers: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare(other, tuned)
    assert not (tmp_path / "compare.json").exists()
    monkeypatch.undo()
    compare(other, tuned)
    assert (tmp_path / "compare.json").read_bytes() == (run.folder / "compare.json").read_bytes()


def test_a_torn_measurement_is_made_again(finished):
    run, comparison = finished
    for path in (run.folder / "nats").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    again = compare(run, {"tuned": tuned_row(run)})
    assert [replace(row, seconds=0) for row in again.rows] == [replace(row, seconds=0) for row in comparison.rows]


def test_needles_are_asked_of_the_model_that_was_measured(tmp_path, monkeypatch):
    """It is loaded once, and asked again only when the weights are others."""
    base = save_tiny(tmp_path / "base")
    recipe = parse_recipe(recipe_tree(base, tmp_path), ["eval.retrieval={per_cell: 1, depths: [0.5]}"])
    run, loaded, asked = Run(recipe, tmp_path / "run"), [], []
    load, score = models.AutoModelForCausalLM.from_pretrained, recall.score_transformers
    monkeypatch.setattr(
        models.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loaded.append(1) or load(*a, **k)
    )
    monkeypatch.setattr(recall, "score_transformers", lambda *a: asked.append(1) or score(*a))
    first = compare(run, {}, only=["none", "yarn"])
    assert (len(loaded), len(asked)) == (1, 2 * 3)
    assert compare(run, {}, only=["none", "yarn"]) == first
    assert (len(loaded), len(asked)) == (1, 2 * 3)
    os.utime(base / "model.safetensors", (1, 1))
    compare(run, {}, only=["none", "yarn"])
    assert (len(loaded), len(asked)) == (2, 4 * 3)


def test_runs_on_another_base_are_refused(finished, tmp_path):
    """Their numbers would be measured on this one."""
    run, _ = finished
    (tmp_path / "link").symlink_to(run.recipe.base.model)
    other = save_tiny(tmp_path / "base", "qwen2")
    for settings in ([f"base.model={other}"], ["base.revision=main"]):
        recipe = parse_recipe(run.recipe.to_dict(), settings)
        with pytest.raises(UserError, match=r"base.model .* is not the base that is measured here"):
            named_rows(run, [copied(run, recipe, tmp_path / "other")])
    recipe = parse_recipe(run.recipe.to_dict(), [f"base.model={tmp_path / 'link'}"])
    assert set(named_rows(run, [copied(run, recipe, tmp_path / "same")])[0]) == {"tuned-run", "tuned-same"}


def test_rows_of_one_name_are_refused(finished, tmp_path):
    run, _ = finished
    other = copied(run, run.recipe, tmp_path / "run")
    for others in ([other], [run.folder]):
        with pytest.raises(UserError, match="compare: tuned-run would be the name of two rows"):
            named_rows(run, others)
    bases = [save_tiny(tmp_path / name / "runs" / "export") for name in ("a", "b")]
    with pytest.raises(UserError, match="checkpoint runs/export would be the name of two rows"):
        named_rows(run, bases)


def copied(run: Run, recipe: Recipe, folder: Path) -> Path:
    """A finished run of another recipe."""
    shutil.copytree(run.folder, folder, dirs_exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    return folder


def rows_with(**nll: float) -> Comparison:
    rows = [Row(name.replace("_", "-"), {256: value}, [value], value) for name, value in nll.items()]
    return Comparison(64, 256, [0, 256], ["document 1, part 1"], rows)


def test_the_verdict_is_honest():
    lost = rows_with(none=5.0, native_window=3.0, yarn=3.4, tuned=3.2)
    assert lost.verdict().startswith("No extended method beats the native window slid over the document")
    assert "tuned, 0.2000 nats behind" in lost.verdict()
    won = rows_with(none=5.0, native_window=3.3, yarn=3.4, tuned=3.2)
    assert won.verdict() == "tuned beats the slid native window at 256 tokens by 0.1000 nats."
    assert table(won).splitlines()[-1] == "| tuned | 3.200 | 3.200 | 24.53 | -1.800 | 0 |"


def test_learned_rows_excerpt_by_excerpt():
    rows = rows_with(none=5.0, native_window=3.2, yarn=3.4, tuned=3.2).rows
    assert Comparison(64, 256, [0, 256], ["one", "two"], rows).by_excerpt() == ""
    values = {"none": [5.0, 5.0], "native-window": [3.0, 3.4], "yarn": [3.1, 3.7], "tuned": [3.05, 3.35]}
    rows = [replace(row, by_excerpt=values[row.method]) for row in rows]
    assert Comparison(64, 256, [0, 256], ["one", "two"], rows).by_excerpt() == (
        "By held-out excerpt, tuned is below yarn on 2 of 2 (-0.350 to -0.050 nats), "
        "below native-window on 1 of 2 (-0.050 to +0.050 nats)."
    )


def test_key_tokens_by_hand():
    """Of five tokens, far context helps the second and the fourth enough, and the fourth is still predicted badly."""
    near = torch.tensor([1.0, 3.5, 2.9, 6.0, 0.5])
    far = torch.tensor([1.0, 1.9, 1.0, 3.0, 0.9])
    tuned = torch.tensor([9.0, 0.25, 9.0, 9.0, 9.0])
    rows = rows_with(native_window=3.0, yarn=2.0, tuned=2.0)
    nats = {"native-window": [near], "yarn": [far], "tuned": [tuned]}
    found = key_tokens(rows, nats, gain=2.0, floor=2.0)
    assert [row.key_nll for row in found.rows] == pytest.approx([3.5, 1.9, 0.25])
    assert {row.key_tokens for row in found.rows} == {1}
    assert key_tokens(rows, nats, gain=4.0, floor=2.0) == rows
    assert math.isclose(key_tokens(rows, nats, gain=2.0, floor=3.0).row("tuned").key_nll, (0.25 + 9.0) / 2)
