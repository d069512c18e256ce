"""The loop: it lowers the loss, clips, resumes bit for bit, and never overwrites good values."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import recipe_tree, save_tiny
from yarn_tune.data.packing import Packed, Row
from yarn_tune.data.positions import place_contiguous
from yarn_tune.data.rows import RowSet
from yarn_tune.errors import CheckFailed, UserError
from yarn_tune.files import write_checked
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.runs.checkpoint import latest_state
from yarn_tune.runs.folder import Run
from yarn_tune.runs.metrics import EARLIER, spent
from yarn_tune.training.loop import train
from yarn_tune.training.objective import Objective
from yarn_tune.training.optimizer import rate_share
from yarn_tune.training.resuming import Progress, facts_to_agree_on
from yarn_tune.tunable.rotary import at_start


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def make_run(base, tmp_path):
    def make(name="run", *overrides, **settings):
        recipe = parse_recipe(recipe_tree(base, tmp_path, **settings), list(overrides))
        return Run(recipe, tmp_path / name)

    return make


def numbers(run):
    return load_file(run.numbers_path)


def metrics(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("frequencies", ["scale", "ramp", "per_pair"])
def test_the_loss_falls_on_its_own_rows(make_run, frequencies):
    run = make_run("run", f"rope.frequencies={frequencies}", "data.rows=2", steps=30, learning_rate=0.03)
    train(run)
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.01
    assert all(line["tokens"] == 2 * 256 for line in lines)
    assert set(lines[0]["learned"]) >= {"temperature"}
    assert yaml.safe_load((run.folder / "recipe.yaml").read_text()) == run.recipe.to_dict()
    assert json.loads((run.folder / "environment.json").read_text())["processes"] == 1


@pytest.mark.parametrize("checkpointing", [True, False])
def test_micro_batches_equal_one_batch(make_run, checkpointing):
    settings = {"batch_size": 4, "gradient_checkpointing": checkpointing, "steps": 3}
    runs = [make_run(f"m{m}", micro_batch_size=m, **settings) for m in (1, 4)]
    for run in runs:
        train(run)
    for name, value in numbers(runs[0]).items():
        torch.testing.assert_close(value, numbers(runs[1])[name], rtol=1e-3, atol=1e-5)
    for one, other in zip(metrics(runs[0]), metrics(runs[1]), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_clipping_clips(make_run, monkeypatch):
    """The gradient that reaches the optimizer has the norm asked for; the logged one is the true norm."""
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(make_run("free", clip=0.0, steps=1))
    run = make_run("clipped", clip=1e-3, steps=1)
    train(run)
    free, clipped = norms
    assert free > 0.01
    assert clipped == pytest.approx(1e-3, rel=1e-3)
    assert metrics(run)[0]["gradient_norm"] == pytest.approx(free, rel=1e-5)


def test_weight_decay_pulls_to_search_free_yarn(make_run):
    runs = [make_run(f"d{decay}", weight_decay=decay, steps=8) for decay in (0.0, 20.0)]
    for run in runs:
        train(run)
    free, pulled = (sum(v.square().sum().item() for v in numbers(run).values()) for run in runs)
    assert pulled < 0.7 * free


def test_rates_rise_then_fall_to_a_tenth():
    shares = [rate_share(step, 100, 0.1) for step in range(100)]
    assert shares.index(max(shares)) == 10
    assert shares[0] < 0.1
    assert max(shares) == 1.0
    assert shares[-1] == pytest.approx(0.1, abs=1e-3)


def test_nan_stops_with_the_last_good_values(make_run, monkeypatch):
    run = make_run(steps=6, checkpoint_every=100)
    forward, calls = Objective.forward, []

    def spoiled(self, *args, **kwargs):
        calls.append(1)
        nats = forward(self, *args, **kwargs)
        return nats * float("nan") if len(calls) == 7 else nats

    monkeypatch.setattr(Objective, "forward", spoiled)
    with pytest.raises(CheckFailed, match="step 4: loss nan") as failure:
        train(run)
    state = latest_state(run.folder / "checkpoints")
    assert state.step == 3
    assert all(bool(t.isfinite().all()) for t in state.numbers.values())
    assert not run.numbers_path.exists()
    # The remedy of the message: another run continues from the last good values, with a lower rate.
    (setting,) = re.findall(r"rope\.init=\S+", str(failure.value))
    after = make_run("after", setting, steps=2, learning_rate=1e-12)
    train(after)
    for name, value in numbers(after).items():
        torch.testing.assert_close(value, state.numbers[name], rtol=0, atol=1e-10)
    assert spent(after.folder)[:2] == (3 + 2, 5 * 2 * 256)
    with pytest.raises(UserError, match="rope.query_gains: none there, head here"):
        train(make_run("other", setting, "rope.query_gains=head"))


@pytest.mark.parametrize(
    ("able", "dtype", "warned"),
    [
        ("AVX2", "bfloat16", True),
        ("AVX512", "bfloat16", False),
        ("DEFAULT", "bfloat16", False),
        ("AVX2", "float32", False),
    ],
)
def test_a_dtype_that_the_cpu_has_not_is_said_at_the_start(make_run, monkeypatch, capsys, able, dtype, warned):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: able)
    train(make_run("run", f"base.dtype={dtype}", steps=1))
    said = capsys.readouterr().err
    assert "1 process on cpu" in said
    assert ("set base.dtype: float32" in said) == warned


def test_a_folder_of_another_run_is_refused(make_run):
    train(make_run(steps=1))
    with pytest.raises(UserError, match="steps"):
        train(make_run(steps=2))
    train(make_run("run", "eval.documents=1", steps=1))


def test_a_run_from_before_a_setting_existed_is_continued(make_run):
    """The recipe in its folder lacks the key, which then has its default."""
    run = make_run()
    train(run)
    before = yaml.safe_load(run.recipe_path.read_text())
    del before["train"]["keep_attention"]
    run.recipe_path.write_text(yaml.safe_dump(before))
    run.numbers_path.unlink()
    train(run)
    assert yaml.safe_load(run.recipe_path.read_text()) == run.recipe.to_dict()
    with pytest.raises(UserError, match="holds a run with other values"):
        train(make_run("run", "train.keep_attention=true"))


def test_training_again_changes_nothing(make_run):
    run = make_run()
    train(run)
    before, lines = numbers(run), metrics(run)
    train(run)
    assert all(torch.equal(before[name], value) for name, value in numbers(run).items())
    assert metrics(run) == lines


def test_more_rows_than_documents_are_read_again(make_run):
    run = make_run("run", "data.rows=1", steps=3)
    train(run)
    assert len(metrics(run)) == 3


def test_trackers(make_run, monkeypatch, tmp_path):
    """TensorBoard in the run folder; Weights & Biases offline where there is no key."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.chdir(tmp_path)
    run = make_run("run", "runtime.trackers=[tensorboard, wandb]", steps=1)
    train(run)
    assert list(run.folder.rglob("events.out.tfevents*"))
    assert list(tmp_path.rglob("offline-run-*/*.wandb"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_the_step_it_is_in(make_run, tmp_path, number):
    """As a scheduler does it: exit code 128 + n, nothing lost, and the same numbers in the end."""
    whole = make_run("whole", steps=40, checkpoint_every=1000, batch_size=4)
    train(whole)
    recipe = tmp_path / "stopped.yaml"
    recipe.write_text(yaml.safe_dump(whole.recipe.to_dict() | {"name": "stopped"}))
    log = tmp_path / "runs" / "stopped" / "metrics.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "yarn_tune", "train", str(recipe)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number, said
    done = log.read_text().count("\n")
    assert f"stopped by {number.name} after step {done} of 40, which is saved" in said
    assert "Traceback" not in said
    assert latest_state(log.parent / "checkpoints").step == done
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert all(
        torch.equal(value, load_file(log.parent / "learned.safetensors")[n]) for n, value in numbers(whole).items()
    )


def test_processes_with_other_rows_disagree(make_run):
    """The tokens of all rows, in their order, are compared before the first step."""
    run = make_run()
    rows = [place_contiguous(Row(np.arange(at, at + 50, dtype=np.int32), (50,))) for at in (1, 2)]
    packed = Packed([], 2, 100, 2)
    begin = at_start(run.base, run.recipe.rope)
    sets = [RowSet(own, packed, 2) for own in (rows, rows[::-1], rows)]
    told = [facts_to_agree_on(Progress.of(run, None, begin, None, (each, None)), 0) for each in sets]
    assert told[0] == told[2]
    assert {name for name in told[0] if told[0][name] != told[1][name]} == {"training documents"}


def test_a_run_learns_on_from_an_earlier_one(make_run):
    """The first loss is that of the earlier run on the same row; the costs of both runs are counted."""
    first = make_run("first", "rope.query_gains=pair_phase", steps=6, learning_rate=0.03)
    train(first)
    overrides = ["rope.query_gains=pair_phase", f"rope.init={first.folder}", "train.objective=distill"]
    second = make_run("second", *overrides, steps=3)
    train(second)
    begun = make_run("begun", *overrides, steps=3, learning_rate=1e-12)
    train(begun)
    of_adapter = make_run("adapter", *overrides[::2], f"rope.init={first.folder}/adapter", steps=3, learning_rate=1e-12)
    train(of_adapter)
    for name, value in numbers(begun).items():
        torch.testing.assert_close(value, numbers(first)[name], rtol=0, atol=1e-10)
        assert torch.equal(value, numbers(of_adapter)[name])
    assert metrics(begun)[0]["loss"] == metrics(second)[0]["loss"]
    plain = make_run("plain", *overrides[::2], steps=3, learning_rate=1e-12)
    train(plain)
    assert abs(metrics(plain)[0]["loss"] - metrics(begun)[0]["loss"]) > 1e-3
    steps, tokens, seconds = spent(first.folder)
    assert spent(second.folder)[:2] == (steps + 3, tokens + 3 * 2 * 256)
    assert spent(second.folder)[2] > seconds
    assert spent(of_adapter.folder)[:2] == (3, 3 * 2 * 256)


def test_the_earlier_run_is_needed_to_begin_only(make_run):
    """What was taken over is in the first checkpoint; continued without the folder, it ends with the same bits."""
    first = make_run("first", steps=2)
    train(first)
    whole = make_run("whole", f"rope.init={first.folder}", "train.seed=1", steps=4, checkpoint_every=1)
    train(whole)
    before = numbers(whole), spent(whole.folder)[:2]
    for last in (3, 4):
        shutil.rmtree(whole.checkpoints / f"step-{last:06}")
    whole.numbers_path.unlink()
    shutil.rmtree(first.folder)
    train(whole)
    assert all(torch.equal(value, before[0][name]) for name, value in numbers(whole).items())
    assert spent(whole.folder)[:2] == before[1]


def test_an_earlier_run_that_does_not_fit_is_refused(make_run, tmp_path):
    with pytest.raises(UserError, match="nowhere is no finished run"):
        train(make_run("run", "rope.init=nowhere"))
    first = make_run("first", steps=1)
    train(first)
    with pytest.raises(UserError, match="rope.query_gains: none there, head here") as refusal:
        train(make_run("run", f"rope.init={first.folder}", "rope.query_gains=head", "lora={rank: 2}"))
    assert "lora: None there" in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_numbers_are_taken_over_to_a_longer_window(make_run):
    """Offsets from YaRN stay; the YaRN under them is that of the new window."""
    first = make_run("first", "rope.query_gains=pair", steps=4, learning_rate=0.03)
    train(first)
    longer = ["rope.query_gains=pair", "rope.window=512", f"rope.init={first.folder}"]
    second = make_run("second", *longer, steps=1, learning_rate=1e-12)
    train(second)
    start = at_start(second.base, second.recipe.rope).start
    assert start.factor == 2 * at_start(first.base, first.recipe.rope).start.factor
    for name, value in numbers(second).items():
        torch.testing.assert_close(value, numbers(first)[name], rtol=0, atol=1e-10)


def test_what_another_start_took_over_is_not_counted(make_run):
    """It left its note and died before its first checkpoint."""
    run = make_run("run", steps=1)
    write_checked(run.folder / EARLIER, {"learned_in": "elsewhere", "steps": 9, "tokens": 999, "seconds": 9.0})
    train(run)
    assert spent(run.folder)[:2] == (1, 512)
