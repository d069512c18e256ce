"""The demo as a user starts it, shortened: launch.sh, the embedded model, the sample documents."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """launch.sh run with this very environment, on a copy of what it needs."""
    work = tmp_path_factory.mktemp("work")
    for name in ("launch.sh", "pyproject.toml", "constraints.txt", "recipes", "data/tiny-base", "data/sample"):
        source, target = ROOT / name, work / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (work / "venv").mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        (work / "venv" / part).symlink_to(Path(sys.prefix) / part)
    stamp = "touch venv/.ready-$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)"
    subprocess.run(stamp, shell=True, cwd=work, check=True)
    done = subprocess.run(
        ["./launch.sh", "recipes/tiny-demo.yaml", "name=short", "train.steps=24", "eval.documents=3"],
        cwd=work,
        env=os.environ | {"VENV": "venv"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return work, done.stdout


def test_two_processes_with_the_weights_in_shards(launched):
    """From launch.sh to a verified export; `tests/launch` has the numbers."""
    work, _ = launched
    settings = ["name=two", "train.steps=2", "runtime.zero=3", "eval.documents=1", "eval.lengths=[256]"]
    done = subprocess.run(
        ["./launch.sh", "recipes/tiny-demo.yaml", *settings, "eval.retrieval=null"],
        cwd=work,
        env=os.environ | {"VENV": "venv", "NUM_PROCESSES": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes on cpu: 4 rows per step shared by 2" in done.stderr
    assert "in 2 shards (DeepSpeed's ZeRO-3)" in done.stderr
    assert json.loads((work / "runs/two/environment.json").read_text())["processes"] == 2
    assert "verified " in done.stdout
    assert (work / "runs/two/export/config.json").is_file()


def test_it_prints_the_table_and_the_serve_line(launched):
    _, out = launched
    for method in ("none", "native-window", "yarn", "tuned"):
        assert re.search(rf"^ *{method} +[0-9]", out, re.M), method
    assert "vllm serve runs/short/export --max-model-len 2048" in out


def test_tuning_beats_search_free_yarn(launched):
    """At the far end, without a tax inside the native window: even after a few steps."""
    work, _ = launched
    comparison = json.loads((work / "runs/short/compare.json").read_text())
    rows = {row["method"]: row for row in comparison["like"]["rows"]}
    assert rows["tuned"]["nll"]["2048"] < rows["yarn"]["nll"]["2048"]
    assert rows["tuned"]["short_nll"] <= rows["yarn"]["short_nll"]
    assert rows["yarn"]["nll"]["2048"] < rows["none"]["nll"]["2048"]


def test_the_export_is_a_stock_checkpoint(launched):
    work, _ = launched
    export = work / "runs/short/export"
    model = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert model.config.rope_parameters["rope_type"] == "longrope"
    ids = tokenizer("It is a truth universally acknowledged", return_tensors="pt")
    with torch.no_grad():
        assert model.generate(**ids, max_new_tokens=5, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    fidelity = json.loads((export / "fidelity.json").read_text())
    assert max(fidelity["max_abs_logit_difference_before_rounding"].values()) <= 1e-4


def test_the_demo_model_uses_its_window():
    """The loss of the demo base falls with context, and it finds numbers inside its window."""
    measured = json.loads((ROOT / "data/tiny-base/measured.json").read_text())
    positions = list(measured["nll_by_position"].values())
    assert positions[-1] < positions[0] - 0.4
    assert measured["numbers_retrieved"] > 0.5
    size = sum(path.stat().st_size for path in (ROOT / "data/tiny-base").iterdir())
    assert size < 6e6
