"""Files of a run folder are checked before they are used: state, parameters, metrics, measurements, inputs."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import finished_run, recipe_tree, save_tiny, write_documents, write_metrics
from yarn_tune.adapter.files import read_sections
from yarn_tune.errors import UserError
from yarn_tune.evaluation.comparison import compare, named_rows
from yarn_tune.evaluation.methods import Method
from yarn_tune.evaluation.nll_cache import NllCache
from yarn_tune.export.checkpoint import export
from yarn_tune.models.base import BaseModel
from yarn_tune.recipe.loading import RecipeError, load_recipe, parse_recipe
from yarn_tune.recipe.schema import Base
from yarn_tune.runs.checkpoint import State, checkpoints, latest_state, save_state
from yarn_tune.runs.folder import AdapterRun, Run
from yarn_tune.runs.learned import learned_of, tuned_row
from yarn_tune.runs.metrics import spent
from yarn_tune.training.loop import train


def state(step: int) -> State:
    return State(step, {"a": torch.full((3,), float(step))}, {"0.exp_avg": torch.ones(3)}, inputs={"documents": "abc"})


@pytest.mark.parametrize("step", [-1, 1, 3, 99])
def test_the_step_of_a_checkpoint_is_under_its_checksum(tmp_path, capsys, step):
    for each in (1, 2):
        save_state(tmp_path, state(each), keep=3)
    about = tmp_path / "step-000002" / "state.json"
    about.write_text(about.read_text().replace('"step": 2', f'"step": {step}'))
    assert latest_state(tmp_path, report=True).step == 1
    assert "step-000002 is damaged and is skipped" in capsys.readouterr().err


def test_a_checkpoint_under_the_name_of_another_step_is_skipped(tmp_path):
    save_state(tmp_path, state(2), keep=3)
    shutil.copytree(tmp_path / "step-000002", tmp_path / "step-000099")
    assert latest_state(tmp_path).step == 2


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    """As text, 1000000 comes before 999999, and the newest was deleted."""
    for step in (999_998, 999_999, 1_000_000):
        save_state(tmp_path, state(step), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-999999", "step-1000000"]
    assert latest_state(tmp_path).step == 1_000_000


def test_what_else_lies_among_the_checkpoints_stays(tmp_path):
    (tmp_path / "step-000001-mine").mkdir()
    for step in (2, 3):
        save_state(tmp_path, state(step), keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001-mine", "step-000003"}


@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_of_the_learned_parameters_is_refused(tmp_path, bit):
    run = finished_run(tmp_path)
    content = bytearray(run.numbers_path.read_bytes())
    content[-3] ^= 1 << bit
    run.numbers_path.write_bytes(content)
    with pytest.raises(UserError, match=r"learned.safetensors cannot be read \(its checksum does not match"):
        learned_of(run)


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[1:],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[0].replace("2048", "1048"), *lines[1:]],
        lambda lines: [lines[0][:-4], *lines[1:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
    ],
    ids=["first lost", "one lost", "changed", "cut", "order"],
)
def test_a_damaged_record_does_not_shrink_what_was_spent(tmp_path, damage):
    write_metrics(tmp_path, 3)
    assert spent(tmp_path) == (3, 3 * 2048, 4.5)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in damage(path.read_text().splitlines())))
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read \(.*train anew under another name="):
        spent(tmp_path)


def test_a_record_that_lost_its_end_is_refused(make_run):
    run = make_run("small")
    train(run)
    path = run.folder / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"3 of 4 steps are in it"):
        tuned_row(run)


@pytest.fixture
def make_run(tmp_path):
    base = save_tiny(tmp_path / "base")

    def make(name: str, *overrides: str, **settings: object) -> Run:
        return Run(parse_recipe(recipe_tree(base, tmp_path, **settings), list(overrides)), tmp_path / name)

    return make


CHANGES = {
    "training documents": lambda folder: write_documents(folder / "train.jsonl", [700, 300, 90, 40], seed=9),
    "weights of the base": lambda folder: save_file(
        {n: t * 1.01 for n, t in load_file(folder / "base" / "model.safetensors").items()},
        folder / "base" / "model.safetensors", metadata={"format": "pt"}),
    "config of the base": lambda folder: _edit(folder / "base" / "config.json", rms_norm_eps=1e-4),
    "tokenizer of the base": lambda folder: _edit(folder / "base" / "tokenizer_config.json", note="changed"),
}  # fmt: skip


def _edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("changed", CHANGES)
def test_a_run_does_not_continue_with_other_inputs(make_run, tmp_path, changed):
    run = make_run("small")
    train(run)
    shutil.rmtree(run.checkpoints / "step-000004")
    run.numbers_path.unlink()
    CHANGES[changed](tmp_path)
    with pytest.raises(UserError, match=f"these of its inputs changed: {changed}"):
        train(replace(run))
    assert not run.numbers_path.exists()


@pytest.mark.parametrize("changed", ["weights of the base", "config of the base"])
@pytest.mark.parametrize("command", [export, tuned_row])
def test_a_finished_run_is_not_exported_or_measured_over_another_base(make_run, tmp_path, changed, command):
    """Weights that were replaced by a newer release in the same folder, for example."""
    run = make_run("small")
    train(run)
    CHANGES["tokenizer of the base"](tmp_path)  # which the parameters do not depend on
    command(replace(run))
    CHANGES[changed](tmp_path)
    with pytest.raises(UserError, match=f"the {changed} changed since this run was trained on .*base"):
        command(Run(run.recipe, run.folder))


def test_a_changed_recipe_of_a_run_folder_is_refused(tmp_path):
    run = finished_run(tmp_path)
    whole = run.recipe_path.read_text()
    assert load_recipe(run.recipe_path) == run.recipe
    for text in (whole.replace("window: 256", "window: 512"), whole.replace("\n", " ", 1), whole[:-10]):
        run.recipe_path.write_text(text)
        with pytest.raises(RecipeError, match="changed since yarn-tune wrote it"):
            load_recipe(run.recipe_path)
    run.recipe_path.write_text(yaml.safe_dump(run.recipe.to_dict()))  # a recipe of the user's own has no checksum
    assert load_recipe(run.recipe_path) == run.recipe


# Measurements.


@pytest.fixture
def measured(tmp_path):
    """A base, and a function that measures it and returns whether the model was loaded."""
    base = save_tiny(tmp_path / "base")
    document = torch.arange(1, 101)

    def measure(chunk: int | None = None, method: Method | None = None) -> tuple[torch.Tensor, bool]:
        cache = NllCache(BaseModel(Base(model=str(base), dtype="float32")), tmp_path / "nll", chunk)
        facts = cache.base.facts
        found, _ = cache.full(method or Method.fixed(*facts.table(64)), document)
        return found, cache._model is not None

    return base, measure


@pytest.mark.parametrize(
    ("key", "value"),
    [("rms_norm_eps", 0.1), ("hidden_act", "gelu"), ("rope_parameters", {"rope_theta": 5e3})],
)
def test_a_changed_config_is_measured_again(measured, key, value):
    base, measure = measured
    before, loaded = measure()
    assert loaded
    assert not measure()[1]
    _edit(base / "config.json", **{key: value})
    after, loaded = measure()
    assert loaded
    assert key == "rope_parameters" or not torch.equal(before, after)


def test_weights_of_the_same_size_and_time_are_measured_again(measured):
    base, measure = measured
    path = base / "model.safetensors"
    times = path.stat()
    before, _ = measure()
    save_file({n: t + 0.01 for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    after, loaded = measure()
    assert loaded
    assert not torch.equal(before, after)


def test_another_chunk_is_another_measurement(measured):
    _, measure = measured
    measure()
    assert measure(chunk=32)[1]
    assert not measure(chunk=32)[1]


def test_a_damaged_measurement_is_made_again(measured, tmp_path):
    _, measure = measured
    whole, _ = measure()
    (path,) = (tmp_path / "nll").iterdir()
    content = path.read_bytes()
    for at in (20, len(content) // 2, len(content) - 2):
        damaged = bytearray(content)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        found, loaded = measure()
        assert loaded
        assert torch.equal(found, whole)
    other = tmp_path / "nll" / "other.safetensors"
    path.rename(other)
    measure(chunk=32)
    (path,) = [p for p in (tmp_path / "nll").iterdir() if p != other]
    other.replace(path)  # whole, but of another measurement
    assert measure(chunk=32)[1]


def test_a_damaged_comparison_is_neither_shown_nor_put_into_a_card(tmp_path):
    run = finished_run(tmp_path, "scale")
    write_metrics(run.folder, 4)
    compare(run, *named_rows(run, []))
    path = run.folder / "compare.json"
    text = path.read_text()
    number = json.loads(text)["like"]["rows"][0]["short_nll"]
    path.write_text(text.replace(str(number), str(number - 1)))
    with pytest.raises(UserError, match=r"compare.json cannot be read \(its checksum does not match"):
        export(run)


# Adapters.


@pytest.mark.parametrize("settings", [(), ("lora.rank=2",)], ids=["numbers", "lora"])
def test_a_damaged_adapter_is_refused(make_run, settings):
    run = make_run("small", *settings, steps=1)
    train(run)
    folder = run.folder / "adapter"
    adapter = AdapterRun(read_sections(folder), folder)
    whole = learned_of(adapter)
    for path in folder.rglob("adapter_model.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        kept = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"adapter_model.safetensors cannot be read"):
            learned_of(adapter)
        path.write_bytes(kept)
    config = folder / "adapter_config.json"
    _edit(config, beta_fast=33.0)
    with pytest.raises(UserError, match="checksum|other settings"):
        learned_of(adapter)
    _edit(config, beta_fast=32.0)
    assert learned_of(adapter).as_json() == whole.as_json()


def test_a_run_of_an_earlier_version_is_one_message(tmp_path):
    run = finished_run(tmp_path)
    run.recipe_path.write_text("name: run\nbase: {model: base}\nrope: {window: 256, learn: per_pair}\n")
    with pytest.raises(UserError, match=r"whose recipe cannot be read, perhaps one of an earlier yarn-tune.*name=..."):
        train(run)
    with pytest.raises(UserError, match="learn"):
        learned_of(run)
