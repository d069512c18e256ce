"""launch.sh and what starts and stops runs: exit codes and signals come through, GPUs are counted, jobs go on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny import recipe_tree, save_tiny
from yarn_tune.distributed.processes import environment, start
from yarn_tune.distributed.signals import TWICE, Request, stop_on_signal
from yarn_tune.recipe.schema import Runtime
from yarn_tune.runs.checkpoint import latest_state

ROOT = Path(__file__).parents[2]
WAYS = {"one": {}, "torchrun": {"NUM_PROCESSES": "2"}, "accelerate": {"NUM_PROCESSES": "2", "CARDS": "2"}}
"""Of starting processes; with two cards that nvidia-smi lists and nobody has."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """launch.sh in a folder of its own, with this very environment and a base to tune."""
    home = tmp_path_factory.mktemp("home")
    for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, home / name)
    shutil.copytree(ROOT / "recipes/accelerate", home / "recipes/accelerate")
    (home / "venv").mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        (home / "venv" / part).symlink_to(Path(sys.prefix) / part)
    stamp = "touch venv/.ready-$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)"
    subprocess.run(stamp, shell=True, cwd=home, check=True)
    script(home / "tools/nvidia-smi", 'for ((i = 0; i < ${CARDS:-0}; i++)); do echo "GPU $i"; done')
    save_tiny(home / "base")
    return home


def script(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def launched(home: Path, *words: str, **settings: str) -> subprocess.Popen[str]:
    common = {"VENV": "venv", "OMP_NUM_THREADS": "1", "PATH": f"{home / 'tools'}:{os.environ['PATH']}"}
    return subprocess.Popen(
        ["./launch.sh", *words], cwd=home, env=os.environ | common | settings, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def written(home: Path, name: str, **train: object) -> str:
    tree = recipe_tree(home / "base", home, checkpoint_every=1000, **train)
    (home / f"{name}.yaml").write_text(yaml.safe_dump(tree | {"name": name}))
    return f"{name}.yaml"


@pytest.mark.parametrize("way", WAYS)
def test_a_mistake_in_the_recipe_is_told_and_nothing_else(home, way):
    process = launched(home, written(home, f"mistaken-{way}"), "train.steps=0", **WAYS[way])
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert "train.steps: must be at least 1; found 0" in said
    assert "Traceback" not in said
    if way == "one":
        assert said.count("\n") == 2, said


@pytest.mark.parametrize("way", WAYS)
def test_a_signal_to_the_script_reaches_what_it_started(home, way):
    """The step is finished and saved, by whichever launcher."""
    process = launched(home, written(home, f"stopped-{way}", steps=400, batch_size=4), **WAYS[way])
    folder = home / f"runs/stopped-{way}"
    log = folder / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    done = log.read_text().count("\n")
    assert f"stopped by SIGTERM after step {done} of 400, which is saved" in said
    assert "Traceback" not in said
    assert latest_state(folder / "checkpoints").step == done


def test_a_run_that_ends_well(home):
    process = launched(home, written(home, "whole", steps=1), "eval.documents=1", NUM_PROCESSES="2", CARDS="2")
    said = process.communicate(timeout=300)
    assert process.returncode == 0, said[1]
    assert load_file(home / "runs/whole/learned.safetensors")


@pytest.mark.parametrize(
    ("visible", "cards", "count"),
    [(None, 3, 3), ("0,2", 3, 2), ("GPU-8932f937", 3, 1), ("", 3, 0), ("-1", 3, 0), ("0,1", 0, 0), (None, 0, 0)],
)
def test_gpus_are_those_that_are_visible(home, visible, cards, count):
    functions = (home / "launch.sh").read_text().split("\nsetup() ")[0]
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    environment |= {"CARDS": str(cards), "PATH": f"{home / 'tools'}:{os.environ['PATH']}"}
    command = ["bash", "-c", f"{functions}\necho $(gpus)", str(home / "launch.sh")]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said == f"{count}\n"


@pytest.mark.parametrize(
    ("leaves", "again"), [("checkpoints/step-000020", True), ("", False), ("export", False)], ids=str
)
def test_a_job_goes_back_into_the_queue_as_long_as_it_gets_further(home, leaves, again):
    recipe = written(home, f"job-{leaves.split('/')[0]}")
    name = recipe.removesuffix(".yaml")
    (home / f"runs/{name}/checkpoints/step-000010").mkdir(parents=True)
    script(home / "tools/srun", f"mkdir -p runs/{name}/{leaves}; exit 1")
    script(home / "tools/scontrol", '[ "$1" = show ] && echo node0 || echo "$@" >>queued')
    (home / "queued").write_text("")
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": "7", "VENV": "venv"}
    command = ["bash", "recipes/accelerate/slurm.sbatch", recipe]
    environment = os.environ | slurm | {"PATH": f"{home / 'tools'}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=home, env=environment, check=False)
    assert done.returncode == 1
    assert (home / "queued").read_text() == ("requeue 7\n" if again else "")


def test_the_same_signal_twice_is_one_request(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with stop_on_signal() as request:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert request.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        now += TWICE + 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


class One:
    """An accelerator of one process."""

    num_processes = 1


def test_while_it_saves_the_launchers_signal_is_the_same_request(monkeypatch):
    """Where another process is out first, the launcher ends those that are left."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    request = Request()
    assert request.agreed(One()) == 0
    request.take(signal.SIGINT)
    now += TWICE + 1
    assert request.agreed(One()) == signal.SIGINT
    request.take(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        request.take(signal.SIGINT)


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    world = start(Runtime(), 0, 1, 1, tmp_path)
    assert len(environment(world)["commit"] or 40 * "0") == 40
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(world)["commit"] is None
