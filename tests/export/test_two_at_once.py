"""Two exports of one run at once, killed exports and damaged ones: what is there is whole, or it is refused."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
from tiny import finished_run, write_metrics
from yarn_tune.cli.main import main
from yarn_tune.errors import UserError
from yarn_tune.export.checkpoint import export
from yarn_tune.export.fidelity import Fidelity
from yarn_tune.files import locked
from yarn_tune.serving.verification import verify


def started(run) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "yarn_tune", "export", str(run.folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def test_two_exports_at_once_leave_one_whole_export(tmp_path):
    """Each of two processes writes the export or ends with a message that names the process that writes."""
    run = finished_run(tmp_path, "scale")
    export(run)
    both = [started(run), started(run)]
    said = [process.communicate(timeout=300)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 0], [0, 2]), said
    if codes == [0, 2]:
        assert any("another yarn-tune process is writing there" in text for text in said)
    assert verify(str(run.folder / "export")).passed
    assert not list(run.folder.glob(".*.partial"))


@pytest.mark.parametrize("command", ["train", "compare", "export", "run"])
def test_every_command_that_writes_into_a_run_folder_takes_its_lock(tmp_path, capsys, command):
    run = finished_run(tmp_path, "scale")
    write_metrics(run.folder, 4)
    before = {path.name for path in run.folder.iterdir()}
    with locked(run.folder):
        assert main([command, str(run.folder)]) == 2
    assert "another yarn-tune process is writing there" in capsys.readouterr().err
    assert {path.name for path in run.folder.iterdir()} - before == {".lock"}


def test_a_killed_export_is_cleared_away_by_the_next_command(tmp_path):
    run = finished_run(tmp_path, "scale")
    target = export(run)
    process = started(run)
    deadline = time.monotonic() + 120
    while not list(run.folder.glob(".export.*.partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert verify(str(target)).passed
    for name in (".recipe.yaml.12345.partial", "checkpoints/.step-000001.7.partial"):
        (run.folder / name).parent.mkdir(exist_ok=True)
        (run.folder / name).write_text("half")
    with locked(run.folder):
        pass
    assert not [*run.folder.glob(".*.partial"), *run.folder.glob("*/.*.partial")]


def test_an_export_that_was_being_replaced_is_put_back(tmp_path):
    """Where two names cannot be swapped at once, a kill may come between the two renames."""
    run = finished_run(tmp_path, "scale")
    target = export(run)
    target.rename(run.folder / ".export.replaced")
    with locked(run.folder):
        assert verify(str(target)).passed


def test_every_file_of_an_export_can_be_read_by_others(tmp_path):
    run = finished_run(tmp_path, "scale", settings=("export.fold=always",))
    mask = os.umask(0o022)
    try:
        target = export(run)
    finally:
        os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()} == {0o644}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_changed_file_of_an_export_is_found(tmp_path, name):
    run = finished_run(tmp_path, "scale")
    path = export(run) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    try:
        checked = verify(str(run.folder / "export"))
    except UserError:
        assert name == "config.json"
        return
    assert not checked.passed
    assert f"{name}: changed since it was exported" in checked.errors
    path.unlink()
    if name != "config.json":
        assert f"{name}: cannot be read (No such file or directory)" in verify(str(path.parent)).errors


def test_a_changed_comparison_with_memory_is_refused(tmp_path):
    run = finished_run(tmp_path, "scale")
    target = export(run)
    again = tmp_path / "again"
    shutil.copytree(target, again)
    text = (again / "fidelity.json").read_text()
    (again / "fidelity.json").write_text(text.replace('"window": 256', '"window": 257'))
    for read in (lambda: Fidelity.read(again), lambda: verify(str(again))):
        with pytest.raises(UserError, match=r"fidelity.json cannot be read \(its checksum does not match"):
            read()


def test_the_lock_of_a_run_clears_nothing_away_in_a_run_inside_it(tmp_path):
    """The control of a comparison is trained in the run's folder, under a lock of its own."""
    inner = tmp_path / "run" / "native-adapted"
    with locked(inner):
        partials = [tmp_path / "run" / name for name in (".a.1.partial", "checkpoints/.b.1.partial")]
        kept = [inner / ".c.1.partial", inner / "checkpoints" / ".d.1.partial"]
        for path in (*partials, *kept):
            path.parent.mkdir(exist_ok=True)
            path.write_text("half")
        with locked(tmp_path / "run"):
            assert [path.exists() for path in (*partials, *kept)] == [False, False, True, True]
    with locked(inner):
        assert not [path for path in kept if path.exists()]
