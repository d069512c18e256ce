"""Killed, left alone, without room, without a tracker: a run ends with a word and continues to the same values."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny import recipe_tree, save_tiny
from yarn_tune.runs.checkpoint import latest_state

KILLS = Path(__file__).with_name("kills.py")
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def recipe(tmp_path):
    """A recipe file of twelve steps, each saved."""
    tree = recipe_tree(save_tiny(tmp_path / "base"), tmp_path, steps=12, batch_size=4, checkpoint_every=1)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree | {"name": "run"}))
    return path


def command(recipe: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "yarn_tune", "train", str(recipe), *overrides]


def started(recipe: Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(recipe, *overrides), cwd=recipe.parent, env=ALONE | environment, stderr=subprocess.PIPE, text=True
    )


def steps_logged(recipe: Path, process: subprocess.Popen[str], count: int) -> None:
    """Wait until that many steps are in the metrics."""
    log = recipe.parent / "runs/run/metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= count):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]


def killed(recipe: Path, *options: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, str(KILLS), *options, str(recipe.parent / "kills"), str(recipe), "runtime.threads=1"],
        env=ALONE, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("processes", "kills"), [(1, 24), (2, 8)])
def test_killed_at_any_moment_it_ends_with_the_same_bits(recipe, processes, kills):
    found = killed(recipe, "--kills", str(kills), "--processes", str(processes))
    assert found["kills"] == kills
    assert found["equal"]
    assert found["left behind"]["a half-written checkpoint"] >= kills // 5
    assert found["left behind"]["steps"] >= 1


def test_a_killed_export_leaves_nothing_or_all(recipe):
    found = killed(recipe, "--kills", "12", "--export")["exports found"]
    assert sum(found.values()) == 12
    assert set(found) <= {"first: none", "first: whole", "over another: whole"}
    assert found["over another: whole"] == 6


def test_left_alone_a_process_says_so(recipe):
    """Without a launcher that would end it: one of two is killed, and the other must not wait for ever."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29641", "WORLD_SIZE": "2"}
    two = [started(recipe, "train.steps=500", RANK=r, LOCAL_RANK=r, **address) for r in ("0", "1")]
    steps_logged(recipe, two[0], 3)
    two[1].kill()
    _, said = two[0].communicate(timeout=60)
    two[1].communicate()
    assert two[0].returncode == 3, said
    assert "another process of this run died" in said
    assert "Traceback" not in said
    # The line of a step comes before its checkpoint, so the third step may have been lost on the way.
    assert latest_state(recipe.parent / "runs/run/checkpoints").step >= 2


def test_a_process_that_hangs_is_not_waited_for(recipe):
    """The limit is the recipe's: a stopped process looks like one that is slow."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29642", "WORLD_SIZE": "2"}
    settings = ("train.steps=500", "runtime.timeout_minutes=0.1")
    two = [started(recipe, *settings, RANK=r, LOCAL_RANK=r, **address) for r in ("0", "1")]
    steps_logged(recipe, two[0], 3)
    two[1].send_signal(signal.SIGSTOP)
    _, said = two[0].communicate(timeout=90)
    two[1].kill()
    two[1].communicate()
    assert two[0].returncode == 3, said
    assert "took longer than runtime.timeout_minutes" in said


def test_a_full_disk(recipe):
    """A limit of the file size ends a write in the middle of a checkpoint, as a full disk does."""

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    settings = ["lora.rank=2", "train.steps=3"]
    done = subprocess.run(
        command(recipe, *settings), cwd=recipe.parent, env=ALONE, capture_output=True, text=True, preexec_fn=small,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "state.safetensors cannot be written (File too large); everything saved before is kept" in done.stderr
    assert "Traceback" not in done.stderr
    folder = recipe.parent / "runs/run"
    assert not any((folder / "checkpoints").iterdir())
    subprocess.run(command(recipe, *settings), cwd=recipe.parent, env=ALONE, capture_output=True, check=True)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_dead_tracker_and_one_run_after_a_resume(recipe):
    """Weights & Biases' own process is killed: the run goes on; continued, it is the same run there."""
    settings = ("runtime.trackers=[wandb]", "train.steps=60")
    offline = {"WANDB_MODE": "offline", "WANDB_API_KEY": ""}
    process = started(recipe, *settings, **offline)
    steps_logged(recipe, process, 2)
    subprocess.run(["pkill", "-KILL", "-P", str(process.pid), "wandb"], check=True)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    folder = recipe.parent / "runs/run"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 60
    (folder / "learned.safetensors").unlink()
    again = subprocess.run(
        command(recipe, *settings), cwd=recipe.parent, env=ALONE | offline, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    ids = {path.name.rsplit("-", 1)[-1] for path in recipe.parent.rglob("offline-run-*")}
    assert ids == {json.loads((folder / "trackers.json").read_text())["wandb"]}
    assert load_file(folder / "learned.safetensors")


def test_nothing_goes_over_the_network(recipe):
    """A recipe that names no hub id is planned, learned and exported without a connection to anywhere."""
    script = (
        "import sys\n"
        "def hook(event, arguments):\n"
        "    if event == 'socket.getaddrinfo' or event == 'socket.connect' and isinstance(arguments[1], tuple):\n"
        "        raise SystemExit(f'network: {event} {arguments[1:]}')\n"
        "sys.addaudithook(hook)\n"
        "from yarn_tune.cli import main\n"
        "for name in ('plan', 'train', 'export'):\n"
        f"    assert main([name, {str(recipe)!r}, 'train.steps=1']) == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=recipe.parent, env=ALONE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_starts_of_the_same_run(recipe):
    """The second process ends with a message; the first continues."""
    first = started(recipe, "train.steps=500")
    steps_logged(recipe, first, 1)
    second = started(recipe, "train.steps=500")
    _, said = second.communicate(timeout=120)
    assert second.returncode == 2, said
    assert "another yarn-tune process is writing there" in said
    first.terminate()
    assert first.communicate(timeout=60)[1]
    assert first.returncode == 128 + signal.SIGTERM
