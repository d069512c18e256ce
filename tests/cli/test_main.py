"""The command line: the user's mistakes are one message and exit code 2, never a traceback."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import NATIVE, recipe_tree, save_tiny, tiny_config, tiny_tokenizer, write_documents
from transformers import AutoModelForCausalLM
from yarn_tune.cli.main import main
from yarn_tune.cli.result import CommandResult
from yarn_tune.recipe import load_recipe
from yarn_tune.runs.folder import Run, claim_folder


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
    ("rope.factor=0.25", "rope.factor: must be at least 1"),
    ("train.steps=0", "train.steps: must be at least 1"),
    ("train.stops=5", "did you mean 'steps'?"),
    ("rope.beta_fast=0.1", "are the betas swapped?"),
    ("data.train=[]", "data.train: must not be empty"),
    ("data.train=[nowhere.txt]", "no file matches 'nowhere.txt'"),
    ("base.model=nowhere", "neither a checkpoint folder"),
    ("base.model=./nowhere/at-all", "neither a checkpoint folder"),
    ("base.model=org/not-on-this-machine", "could not be loaded"),
    ("rope.frequencies=magic", "must be one of fixed, scale, ramp, per_pair"),
    ("train.batch_size=x", "must be a whole number"),
    ("runtime.processes=7", "runtime.processes: the recipe is for 7 processes, but 1 are running"),
]


@pytest.mark.parametrize(("override", "message"), WRONG, ids=[override for override, _ in WRONG])
def test_wrong_recipes_leave_nothing_behind(recipe, capsys, override, message):
    assert message in fails(capsys, "train", str(recipe), override)
    assert not Path("runs").exists()


def test_missing_validation_documents_are_refused_before_anything_is_loaded(recipe, capsys):
    said = fails(capsys, "train", str(recipe), "train.decide=true", "data.validation=[nowhere.txt]")
    assert said.startswith("yarn-tune: data.validation: no file matches 'nowhere.txt'")
    assert not Path("runs").exists()


def test_a_model_without_rope(recipe, tmp_path, capsys):
    config = tiny_config("gpt2", n_positions=NATIVE)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    for command in ("plan", "train", "run"):
        message = fails(capsys, command, str(recipe), f"base.model={tmp_path / 'gpt2'}")
        assert re.search(
            r"gpt2 (cannot be tuned: its positions are .*, not RoPE|has no rotary position embeddings)", message
        )


def test_a_folder_with_a_broken_config(recipe, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert "could not be loaded" in fails(capsys, "plan", str(recipe), "base.model=broken")


def test_folders_that_are_no_runs(recipe, tmp_path, capsys):
    assert "is not a run folder" in fails(capsys, "export", str(tmp_path / "base"))
    assert "holds no finished run" in fails(capsys, "export", str(recipe))
    assert "no such file" in fails(capsys, "plan", "missing.yaml")


def test_the_whole_path_and_json(recipe, capsys):
    assert main(["plan", str(recipe)]) == 0
    assert (
        "9 numbers (per_pair: 8 frequency, 1 temperature), from YaRN at factor 4 over a native window of 64"
        in capsys.readouterr().out
    )
    assert main(["run", str(recipe), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["export"] == "runs/small/export"
    assert "covers" in captured.err
    assert main(["compare", "runs/small", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparison"]["like"]["rows"][-2]["method"] == "tuned"
    assert main(["export", "runs/small", "--overrides-only"]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"vllm serve {recipe.parent / 'base'} --hf-overrides '")
    overrides = json.loads(line.split("'")[1])
    assert overrides["rope_parameters"]["rope_theta"] == 10000.0
    documents = write_documents(recipe.parent / "more.jsonl", [300], seed=70)
    assert main(["eval", "runs/small/export", str(documents), "--length", "256", "--count", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 255
    assert "base_model: " in Path("runs/small/export/README.md").read_text()
    report = Path("runs/small/report.md").read_text()
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", report):
        assert (Path("runs/small") / picture).stat().st_size > 5000


def test_gains_have_a_picture_and_a_line_in_card_and_page(recipe, capsys):
    assert main(["run", str(recipe), "rope.query_gains=pair_phase", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert "![what was learned, by rotary pair](learned.png)" in Path("runs/small/report.md").read_text()
    assert Path("runs/small/learned.png").stat().st_size > 5000
    card = Path("runs/small/export/README.md").read_text()
    assert "but for gains and phases of the queries" in card
    assert "gains and phases of the queries" in card
    page = Path("runs/small/export/SERVING.md").read_text()
    assert "folded into the query projection, or the norm that follows it (3 x 4 x 8 values" in page
    assert "Attention factor" in page
    assert "what every reader computes from the config" in page
    assert main(["export", "runs/small", "--overrides-only"]) == 2
    assert "rope.query_gains" in capsys.readouterr().err


def test_eval_protocols(recipe, capsys):
    """Sliding over windows as long as the document is truncate; over shorter ones it is not."""
    base = str(recipe.parent / "base")
    documents = str(write_documents(recipe.parent / "more.jsonl", [300], seed=70))

    def mean(*options: str) -> float:
        assert main(["eval", base, documents, "--length", "200", "--dtype", "float32", "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)["mean"]

    truncate = mean()
    assert mean("--chunk", "33") == pytest.approx(truncate, rel=1e-5)
    sliding = ["--protocol", "sliding", "--stride", "48"]
    assert mean(*sliding, "--window", "200") == pytest.approx(truncate, rel=1e-9)
    assert mean(*sliding, "--window", "64") != pytest.approx(truncate, rel=1e-4)
    # Windows of a quarter, 50 tokens, of which half are scored.
    assert mean("--protocol", "sliding") == mean("--protocol", "sliding", "--window", "50", "--stride", "25")


def test_eval_reads_the_beginning_of_each_document(recipe, capsys):
    """A long document counts once for every --count, as docs/measuring.md describes."""
    base = str(recipe.parent / "base")
    documents = write_documents(recipe.parent / "more.jsonl", [450, 230, 100], seed=70)
    for protocol in ("truncate", "sliding"):
        command = ["eval", base, str(documents), "--length", "200", "--count", "9", "--protocol", protocol, "--json"]
        assert main([*command, "--dtype", "float32"]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["tokens"] == 2 * 199
        assert "WARNING: --length 200 is beyond the window of" in printed.err
    assert main(["eval", base, str(documents), "--length", "64", "--json"]) == 0
    assert "WARNING" not in capsys.readouterr().err


def test_retrieve_takes_the_wording_of_the_run(recipe):
    """An export measured with other questions than its run finds less; the run's recipe is beside it."""
    from yarn_tune.cli.eval_commands import _wording_of

    folder = recipe.parent / "run"
    for settings, wording in ((["data.wording=demo"], "demo"), (["data.wording=demo", "eval.retrieval={}"], "plain")):
        claim_folder(Run(load_recipe(recipe, settings), folder))
        assert _wording_of(folder / "export") == wording
    assert _wording_of(folder / "other") == _wording_of(recipe.parent / "export") == "plain"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol", "sliding", "--window", "300"], "2 <= window <= 200"),
        (["--protocol", "sliding", "--window", "0"], "found 0 and 0"),
        (["--protocol", "sliding", "--stride", "0"], "found 50 and 0"),
        (["--protocol", "sliding", "--window", "64", "--stride", "64"], "found 64 and 64"),
        (["--chunk", "0"], "--chunk: at least 1; found 0"),
        (["--chunk", "-3"], "--chunk: at least 1; found -3"),
        (["--count", "0"], "--count: at least 1; found 0"),
        (["--length", "1"], "--length: at least 2; found 1"),
        (["--window", "0", "--stride", "8"], "--window, --stride: only --protocol sliding has windows"),
    ],
)
def test_eval_refuses_impossible_numbers(capsys, options, message):
    assert message in fails(capsys, "eval", "base", "nowhere.txt", "--length", "200", *options)


def test_compare_takes_runs_checkpoints_and_factors(recipe, capsys):
    for name in ("one", "two"):
        assert main(["train", str(recipe), f"name={name}"]) == 0
    assert main(["export", "runs/two"]) == 0
    capsys.readouterr()
    targets = ["runs/one", "runs/two", "runs/two/export"]
    assert main(["compare", *targets, "eval.buckets=4", "--factors", "2,4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in found["comparison"]["like"]["rows"]}
    assert list(rows)[-5:] == ["tuned-one", "tuned-one-slid", "tuned-two", "tuned-two-slid", "checkpoint two/export"]
    exported, tuned = rows["checkpoint two/export"], rows["tuned-two"]
    assert exported["by_position"] == pytest.approx(tuned["by_position"], rel=1e-5)
    cells = {(cell["method"], cell["factor"]): cell for cell in found["factors"]}
    assert cells["yarn", 4.0]["length"] == 4 * NATIVE
    assert cells["yarn", 4.0]["nll"] == pytest.approx(rows["yarn"]["nll"][str(4 * NATIVE)], rel=1e-9)
    slid = rows["native-window"]["nll"][str(4 * NATIVE)]
    rise = 100 * (math.exp(cells["yarn", 4.0]["nll"] - slid) - 1)
    assert cells["yarn", 4.0]["rise"] == pytest.approx(rise)
    assert "neither a run folder" in fails(capsys, "compare", "runs/one", str(recipe))
    for wrong in ("two", "2,nan", "inf", ",", "1e999"):
        assert "--factors: numbers" in fails(capsys, "compare", "runs/one", f"--factors={wrong}")
    for wrong in ("0", "2,-1", "0.5"):
        assert "--factors: finite and at least 1" in fails(capsys, "compare", "runs/one", f"--factors={wrong}")


def test_factors_that_cannot_be_measured_are_refused_before_anything_is(recipe, capsys):
    assert main(["train", str(recipe), "name=three"]) == 0
    capsys.readouterr()
    for wrong, problem in (("0.5", "--factors: finite and at least 1"), ("2,100", "data.heldout: the longest of")):
        assert problem in fails(capsys, "compare", "runs/three", f"--factors={wrong}")
    assert not Path("runs/three/nll").exists()


def test_retrieve_and_lm_eval(recipe, capsys):
    base = str(recipe.parent / "base")
    documents = str(write_documents(recipe.parent / "more.jsonl", [600], seed=70))
    common = ["retrieve", base, documents, "--lengths", "48,64", "--depths", "0,1", "--per-cell", "2"]
    assert main([*common, "--picture", "map.png", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(cell["asked"] for cell in found["cells"]) == 8
    assert Path("map.png").stat().st_size > 5000
    refused = fails(capsys, *common, "--engine", "vllm", "--url", "http://127.0.0.1:9")
    assert "start an OpenAI-compatible server" in refused
    assert main(["lm-eval", base]) == 0
    lines = capsys.readouterr().out
    assert f"--model_args pretrained={base},max_length={NATIVE}" in lines
    assert "--model hf --" in lines
    assert "--model vllm" in lines
    # lm-eval's hf loads AutoModelForCausalLM, which has Gemma 3 with its vision tower and not Qwen3-VL.
    for kind, reader in (("gemma3", "hf"), ("qwen3_vl", "hf-multimodal")):
        text = {"model_type": f"{kind}_text", "max_position_embeddings": NATIVE}
        Path("wrapped").mkdir(exist_ok=True)
        Path("wrapped/config.json").write_text(json.dumps({"model_type": kind, "text_config": text}))
        assert main(["lm-eval", "wrapped"]) == 0
        assert f"--model {reader} --model_args pretrained=wrapped" in capsys.readouterr().out
    config = Path(base) / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if "max_pos" not in k}))
    assert "its config has no max_position_embeddings" in fails(capsys, "lm-eval", base)


def test_plan_warns_about_untrained_distances(recipe, capsys):
    write_documents(recipe.parent / "train.jsonl", [30] * 100)
    assert main(["plan", str(recipe), "data.packing=concat"]) == 0
    assert "WARNING: 88% of the target window's distances are never trained" in capsys.readouterr().out
    assert main(["plan", str(recipe), "data.packing=long"]) == 0
    assert "WARNING" not in capsys.readouterr().out


def test_plan_and_report_cover_rows_as_they_are_cut(recipe, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr("yarn_tune.report.markdown.plot_coverage", lambda covered, path: drawn.append(covered))
    assert main(["run", str(recipe), "data.lengths=[64]", "--json"]) == 0
    assert "WARNING: 75% of the target window's distances are never trained" in capsys.readouterr().err
    assert [covered.untrained for covered in drawn] == [0.75]


def test_plan_says_what_will_be_served(recipe, capsys):
    assert main(["plan", str(recipe)]) == 0
    served = "transformers, transformers-4.57, vllm, vllm-0.29, vllm-0.19, sglang, lmdeploy"
    assert f"serves    {served}" in capsys.readouterr().out
    message = fails(capsys, "plan", str(recipe), "export.stacks=[turbomind, vllm]")
    assert "Unsupported rope type: longrope" in message
    save_tiny(recipe.parent / "gemma", "gemma")
    assert main(["plan", str(recipe), f"base.model={recipe.parent / 'gemma'}"]) == 0
    assert "not served: sglang runs gemma without any RoPE scaling" in capsys.readouterr().out


def test_a_failed_check_is_exit_code_three(recipe, capsys, monkeypatch):
    assert main(["train", str(recipe)]) == 0
    monkeypatch.setattr("yarn_tune.export.fidelity._logit_difference", lambda *models: 2e-4)
    assert main(["export", str(recipe)]) == 3
    assert "no checkpoint was written" in capsys.readouterr().err
    assert not Path("runs/small/export").exists()


def test_one_process_may_shard_without_a_launcher(recipe):
    """ZeRO-3 without a launcher gives the values of a plain run; `tests/launch` starts several processes."""
    assert main(["train", str(recipe), "name=one"]) == 0
    command = [sys.executable, "-m", "yarn_tune", "train", str(recipe), "name=sharded", "runtime.zero=3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, sharded = (load_file(f"runs/{name}/learned.safetensors") for name in ("one", "sharded"))
    for name, value in one.items():
        torch.testing.assert_close(sharded[name], value, rtol=0, atol=1e-5)


def test_what_libraries_print_stays_off_stdout(capsys, monkeypatch):
    """DeepSpeed logs to stdout when it is imported; `--json` promises one object there."""

    def command(options):
        print("a library speaks")
        return CommandResult("text", {"value": 1, "errors": [math.inf, (math.nan, 0.5)]})

    monkeypatch.setattr("yarn_tune.cli.run_commands.plan_command", command)
    assert main(["plan", "recipe.yaml", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"value": 1, "errors": [None, [None, 0.5]]}
    assert "a library speaks" in err
