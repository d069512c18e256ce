"""The command line: the user's mistakes are one message and exit code 2, never a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import NATIVE, recipe_tree, save_tiny, tiny_config, tiny_tokenizer, write_documents
from transformers import AutoModelForCausalLM
from yarn_tune.cli import main

GOOD_COMMANDS = ("plan", "train", "compare", "export", "run", "eval")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A valid recipe file in a fresh working directory."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(recipe_tree(tmp_path / "base", tmp_path, steps=2)))
    return path


def fails(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


WRONG = [
    ("rope.window=32", "rope.window: 32 is smaller than the base model's native window 64"),
    ("rope.factor=0.25", "rope.factor: a factor below 1"),
    ("train.steps=0", "train.steps: at least 1"),
    ("train.stops=5", "did you mean 'steps'?"),
    ("train.use_reentrant=true", "reentrant checkpointing fails"),
    ("rope.beta_fast=0.1", "are the betas swapped?"),
    ("data.train=[]", "no documents"),
    ("data.train=[nowhere.txt]", "no file matches 'nowhere.txt'"),
    ("base.model=nowhere", "neither a checkpoint folder"),
    ("base.model=./nowhere/at-all", "neither a checkpoint folder"),
    ("base.model=org/not-on-this-machine", "could not be loaded"),
    ("rope.learn=magic", "must be one of scale, ramp, frequency"),
    ("train.batch_rows=x", "must be a whole number"),
    ("runtime.processes=7", "runtime.processes: the recipe asks for 7, 1 are running"),
]


@pytest.mark.parametrize(("override", "message"), WRONG, ids=[override for override, _ in WRONG])
def test_wrong_recipes_leave_nothing_behind(recipe, capsys, override, message):
    assert message in fails(capsys, "train", str(recipe), override)
    assert not Path("runs").exists()


def test_a_model_without_rope(recipe, tmp_path, capsys):
    config = tiny_config("gpt2", n_positions=NATIVE)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    for command in ("plan", "train", "run"):
        message = fails(capsys, command, str(recipe), f"base.model={tmp_path / 'gpt2'}")
        assert "gpt2 has no rotary position embeddings (RoPE), so there is nothing to tune" in message


def test_a_folder_with_a_broken_config(recipe, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert "could not be loaded" in fails(capsys, "plan", str(recipe), "base.model=broken")


def test_folders_that_are_no_runs(recipe, tmp_path, capsys):
    assert "is not a run folder" in fails(capsys, "export", str(tmp_path / "base"))
    assert "nothing learned here yet" in fails(capsys, "export", str(recipe))
    assert "no such file" in fails(capsys, "plan", "missing.yaml")


def test_the_whole_path_and_json(recipe, capsys):
    assert main(["plan", str(recipe)]) == 0
    assert "numbers (frequency), from YaRN at factor 4 over a native window of 64" in capsys.readouterr().out
    assert main(["run", str(recipe), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["export"] == "runs/small/export"
    assert "covers" in captured.err
    assert main(["compare", "runs/small", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][-1]["method"] == "tuned"
    assert main(["export", "runs/small", "--overrides-only"]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"vllm serve {recipe.parent / 'base'} --hf-overrides '")
    overrides = json.loads(line.split("'")[1])
    assert overrides["rope_parameters"]["rope_theta"] == 10000.0
    documents = write_documents(recipe.parent / "more.jsonl", [300], seed=70)
    assert main(["eval", "runs/small/export", str(documents), "--length", "256", "--count", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 255


def test_plan_warns_about_untrained_distances(recipe, capsys):
    write_documents(recipe.parent / "train.jsonl", [30] * 100)
    assert main(["plan", str(recipe), "data.packing=concat"]) == 0
    assert "WARNING: 88% of the target window's distances are never trained" in capsys.readouterr().out
    assert main(["plan", str(recipe), "data.packing=long"]) == 0
    assert "WARNING" not in capsys.readouterr().out


def test_a_failed_check_is_exit_code_three(recipe, capsys, monkeypatch):
    assert main(["train", str(recipe)]) == 0
    monkeypatch.setattr("yarn_tune.export._logit_difference", lambda *models: 2e-4)
    assert main(["export", str(recipe)]) == 3
    assert "no checkpoint was written" in capsys.readouterr().err
    assert not Path("runs/small/export").exists()


def test_two_processes_equal_one(recipe):
    """Data parallel over gloo: the same global batch gives the same numbers."""
    assert main(["train", str(recipe), "name=one"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29613"]
    command += ["-m", "yarn_tune", "train", str(recipe), "name=two", "runtime.processes=2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    from safetensors.torch import load_file

    one, two = (load_file(f"runs/{name}/learned.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-6)


def test_help_names_every_command():
    done = subprocess.run([sys.executable, "-m", "yarn_tune", "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in GOOD_COMMANDS)
