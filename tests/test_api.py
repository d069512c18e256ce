"""The Python names do what the commands do, and cost nothing until they are used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
import yarn_tune
from tiny import recipe_tree, save_tiny
from yarn_tune.cli.main import main


def test_the_names():
    assert set(yarn_tune.__all__) <= set(dir(yarn_tune))
    for name in set(yarn_tune.__all__) - {"__version__"}:
        assert getattr(yarn_tune, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'plans'"):
        _ = yarn_tune.plans


def test_importing_the_package_needs_no_torch():
    code = "import yarn_tune, sys; yarn_tune.UserError; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_is_the_commands_run(tmp_path, monkeypatch, capsys):
    """The same bits learned, and the same checkpoint but for what is timed."""
    monkeypatch.chdir(tmp_path)
    tree = recipe_tree(save_tiny(tmp_path / "base"), tmp_path, steps=2)
    Path("small.yaml").write_text(yaml.safe_dump(tree))
    assert main(["run", "small.yaml", "name=command", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    tuning = yarn_tune.Tuning("small.yaml", ["name=python"])
    assert "9 numbers" in tuning.plan().text()
    learned = tuning.train()
    assert learned.temperature > 0
    comparison = tuning.compare()
    assert comparison.verdict().lines() == said["verdict"]
    path = tuning.export()
    assert tuning.verify().passed
    assert yarn_tune.verify(str(path)).passed
    for name in ("config.json", "model.safetensors", "fidelity.json"):
        assert (path / name).read_bytes() == (Path("runs/command/export") / name).read_bytes()
    again = yarn_tune.Tuning(tuning.run.folder)
    assert again.run.folder == tuning.run.folder
    assert again.train().factors == learned.factors
    # Under another name a run's recipe is another run, beside it.
    named = yarn_tune.Tuning(tuning.run.folder, ["name=other", "train.steps=1"])
    assert named.run.folder == tuning.run.folder.parent / "other"
    beside = again.compare([Path("runs/command")])
    assert beside.row("tuned-python").nll == beside.row("tuned-command").nll


def test_a_recipe_as_dicts(tmp_path):
    tree = recipe_tree(save_tiny(tmp_path / "base"), tmp_path)
    tuning = yarn_tune.Tuning(tree, ["train.steps=1"], tmp_path / "elsewhere")
    assert tuning.run.recipe.train.steps == 1
    assert tree["train"]["steps"] == 4, "the caller's stays as it was"
    assert tuning.run.folder == tmp_path / "elsewhere"
    with pytest.raises(yarn_tune.UserError, match="is not a run folder"):
        yarn_tune.Tuning(tmp_path)
