"""Commands on runs that are finished, interrupted or to be longer, and under a launcher of several processes."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import recipe_tree, save_tiny, write_documents
from yarn_tune.cli.main import main
from yarn_tune.files import read_checked
from yarn_tune.training import loop


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A valid recipe file of 4 steps, with a checkpoint after 2, in a fresh working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(recipe_tree(save_tiny(tmp_path / "base"), tmp_path)))
    return path


def refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def interrupt(monkeypatch, step: int) -> None:
    """End the training before this step is recorded."""

    def end(self, number, *_):
        if number == step:
            raise KeyboardInterrupt

    monkeypatch.setattr("yarn_tune.runs.metrics.ProgressLine.step", lambda self, *_: None)
    original = loop.MetricsLog.write
    monkeypatch.setattr(loop.MetricsLog, "write", lambda self, *a: (end(self, *a), original(self, *a)))


def test_a_finished_run_is_said_to_be_complete(recipe, capsys, monkeypatch):
    assert main(["train", str(recipe), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["trained"]
    monkeypatch.setattr("yarn_tune.training.loop.prepare", lambda *_: pytest.fail("the model is loaded again"))
    assert main(["train", str(recipe)]) == 0
    assert "runs/small is complete: 4 steps were trained before, and none now" in capsys.readouterr().out
    assert main(["train", "runs/small", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first | {"trained": False}
    write_documents(recipe.parent / "train.jsonl", [700, 300, 90, 40], seed=9)
    assert "these of its inputs changed: training documents" in refused(capsys, "train", str(recipe))


def test_a_longer_run_is_offered_with_the_line_to_type(recipe, capsys):
    assert main(["train", str(recipe)]) == 0
    message = refused(capsys, "train", str(recipe), "train.steps=8")
    assert "runs/small is complete after 4 steps" in message
    offered = message.splitlines()[-1].strip()
    assert offered == ("yarn-tune train runs/small name=small-8 rope.init=runs/small train.steps=4 train.seed=1")
    assert main(shlex.split(offered)[1:]) == 0
    earlier = read_checked(Path("runs/small-8/earlier.json"), "")
    assert (earlier["learned_in"], earlier["steps"]) == ("runs/small", 4)
    start = load_file("runs/small/learned.safetensors")
    end = load_file("runs/small-8/learned.safetensors")
    assert any(not torch.equal(start[name], end[name]) for name in start)
    capsys.readouterr()


def test_of_a_changed_recipe_only_the_changed_keys_are_shown(recipe, capsys):
    assert main(["train", str(recipe)]) == 0
    capsys.readouterr()
    changed = ["train.learning_rate={frequency: 0.01}", "lora.rank=4", "train.steps=3"]
    lines = refused(capsys, "train", str(recipe), *changed).splitlines()
    assert [line.strip() for line in lines[-3:]] == [
        'lora: null -> {"rank": 4, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}',
        "train.steps: 4 -> 3",
        "train.learning_rate.frequency: 0.02 -> 0.01",
    ]
    assert len(lines) == 4
    assert "train.steps: 4 -> 3" in refused(capsys, "train", str(recipe), "train.steps=3")


def test_compare_tells_that_a_run_is_interrupted(recipe, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert main(["train", str(recipe)]) == 130
    capsys.readouterr()
    assert main(["compare", str(recipe)]) == 0
    out, err = capsys.readouterr()
    told = "runs/small is interrupted after step 2 of 4, so the table has no row of it; `yarn-tune train runs/small`"
    assert out.startswith(told)
    assert told in err
    assert main(["train", "runs/small"]) == 0
    assert main(["compare", "runs/small"]) == 0
    out, err = capsys.readouterr()
    assert "interrupted" not in out + err
    assert "tuned" in out


def test_one_process_of_a_launch_compares(recipe, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["compare", str(recipe)]) == 0
    assert main(["export", "runs/nowhere"]) == 0  # refused in the first process
    assert capsys.readouterr().out == ""
    assert not Path("runs").exists()
    monkeypatch.setenv("RANK", "0")
    assert main(["compare", str(recipe)]) == 0
    assert "yarn" in capsys.readouterr().out


def test_retrieve_prints_before_it_draws(recipe, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "map.png")

    monkeypatch.setattr("yarn_tune.report.heat_map", full)
    documents = str(write_documents(recipe.parent / "more.jsonl", [600], seed=70))
    command = ["retrieve", "base", documents, "--lengths", "48", "--depths", "0", "--per-cell", "1"]
    assert main([*command, "--picture", "map.png"]) == 2
    out, err = capsys.readouterr()
    assert "| mean |" in out
    assert "map.png: No space left on device" in err


def test_a_picture_is_checked_before_anything_is_measured(recipe, capsys, monkeypatch):
    monkeypatch.setattr("yarn_tune.models.BaseModel.load", lambda *_: pytest.fail("the model is loaded"))
    documents = str(write_documents(recipe.parent / "more.jsonl", [600], seed=70))
    command = ["retrieve", "base", documents, "--lengths", "48", "--picture"]
    (recipe.parent / "taken.png").mkdir()
    for name, message in (
        ("map.bmp", "must end in .png, .pdf or .svg"),
        ("nowhere/map.png", "there is no folder 'nowhere'"),
        ("taken.png", "'taken.png' cannot be written"),
    ):
        assert message in refused(capsys, *command, name)
