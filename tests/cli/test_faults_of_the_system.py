"""What a user, an administrator or a file can cause: a message with exit code 2, never a traceback, never a hang."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny import finished_run, recipe_tree, save_tiny
from yarn_tune.cli.main import main
from yarn_tune.files import write_atomically
from yarn_tune.recipe.parsing import read_yaml

ROOT = str(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_tree(save_tiny(folder / "base"), folder)))
    return path


def refused(capsys, *arguments: str) -> str:
    assert main([str(each) for each in arguments]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB + "name: *i\n",
        MERGES,
        "&a [*a]",
        "[" * 5000,
        f"train: {{steps: {'9' * 5000}}}",
        "train: {steps: 2026-02-31}",
        "name: a\ntrain: {steps: 1}\nname: b\n",
        "train: {steps: 1, seed: 2, steps: 3}",
        "data: {train: [{a: 1, a: 1}]}",
        "train: {steps: 017}",
        "train: {steps: 0_17}",
        "train: {steps: -017}",
        "runtime: {timeout_minutes: 1:30}",
        "runtime: {timeout_minutes: 1:30.5}",
        "data: {lengths: [256, 0400]}",
    ],
    ids=[
        "aliases",
        "merges",
        "itself",
        "deep",
        "digits",
        "date",
        "twice",
        "twice inside",
        "twice in a list",
        "octal",
        "octal 2",
        "octal 3",
        "base 60",
        "base 60, 2",
        "octal in a list",
    ],
)
def test_yaml_that_grows_or_cannot_be_read(tmp_path, capsys, text):
    """An alias bomb of nine lines is nine to the ninth values when it is shown."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    begun = time.process_time()
    said = refused(capsys, "plan", path)
    assert "not readable as YAML" in said
    assert len(said) < 2000
    assert time.process_time() - begun < 60
    capsys.readouterr()


@pytest.mark.parametrize(("value", "read", "base"), [("010", "8", 8), ("1:30", "90", 60)])
def test_a_number_that_yaml_reads_in_another_base_is_named(recipe, capsys, value, read, base):
    path = recipe.with_name("bases.yaml")
    path.write_text(f"name: small\ntrain:\n  steps: {value}\n")
    told = f"'{value}' is {read} in YAML 1.1, in base {base}; write the number in base 10, or text in quotes"
    assert f"line 3: {told}" in refused(capsys, "plan", path)
    assert f"override 'train.steps={value}': " in (said := refused(capsys, "plan", recipe, f"train.steps={value}"))
    assert told in said


@pytest.mark.parametrize("value", ["0", "-0", "0.5", "08", "1e-4", "'017'", "2026-01-01", "a:b", "0x10"])
def test_other_numbers_and_texts_are_read(value):
    assert read_yaml(f"a: {value}") == yaml.safe_load(f"a: {value}")


def test_a_key_that_is_given_twice_is_named_with_both_lines(recipe, capsys):
    """A key given twice is refused: YAML readers keep the last value and ignore the first without a message."""
    path = recipe.with_name("twice.yaml")
    path.write_text(recipe.read_text() + "name: other\n")
    first = 1 + recipe.read_text().splitlines().index("name: small")
    line = len(recipe.read_text().splitlines()) + 1
    assert f"line {line}: 'name' was given before, in line {first}" in refused(capsys, "plan", path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.steps=100000000", "at most 10000000; found 100000000"),
        ("rope.window=2000000000", "at most 100000000; found 2000000000"),
        ("train.learning_rate=1e300", "train.learning_rate"),
        ("runtime.timeout_minutes=.inf", "runtime.timeout_minutes"),
        (f"train.steps={'9' * 5000}", "train.steps"),
        ("train.steps=2026-01-01", "train.steps: must be a whole number"),
        (f"name={'n' * 300}", "name: must be a folder name of at most 200 bytes"),
        ('name="a\\0b"', "name: must be a folder name"),
        ('base.model="a\\0b"', "base.model"),
        (f"base.model=./{'n' * 300}", "base.model|File name too long"),
        ('data.train=["a\\0b"]', "data.train"),
        (f"data.train=[{'n' * 300}.txt]", "data.train|File name too long"),
    ],
)
def test_numbers_and_names_without_measure(recipe, capsys, monkeypatch, setting, message):
    monkeypatch.chdir(recipe.parent)
    said = refused(capsys, "plan", recipe, setting)
    assert any(part in said for part in message.split("|")), said
    assert len(said) < 2000


def test_an_adapter_of_an_endless_window(tmp_path, capsys):
    config = {"peft_type": "YARN_TUNE", "base_model_name_or_path": "org/base", "window": 1e30}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert "window: must be" in refused(capsys, "export", tmp_path)


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize(
    "name", ["recipe.yaml", "metrics.jsonl", "checkpoints", "learned.safetensors", "adapter", ".lock"]
)
def test_something_of_another_kind_in_the_way(recipe, tmp_path, capsys, monkeypatch, kind, name):
    """A file where a folder belongs, a folder where a file belongs, a link that leads nowhere."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "runs" / "small" / name
    place.parent.mkdir(parents=True)
    if kind == "file":
        place.write_bytes(b"\xff\x00{")
    elif kind == "folder":
        (place / "inside").mkdir(parents=True)
    else:
        place.symlink_to(tmp_path / "nowhere" / "at" / "all")
    code = main(["train", str(recipe), "train.steps=1"])
    said = capsys.readouterr().err
    assert code in (0, 2), said
    assert "Traceback" not in said


def test_writing_where_nothing_can_be_written(tmp_path):
    """Cleaning up after the failure must not fail in turn, as on a file system that is read-only."""
    from yarn_tune.errors import UserError

    (tmp_path / "file").write_text("x")
    for path, reason in ((tmp_path / "file" / "a", "Not a directory|File exists"), (Path("/proc/yarn-tune"), "."),
                         (tmp_path / ("n" * 300), "File name too long"), (tmp_path / "a\0b", "null")):  # fmt: skip
        with pytest.raises(UserError, match=f"cannot be written \\(.*({reason})"):
            write_atomically(path, b"x")


def test_a_run_folder_that_is_read_only(tmp_path, capsys, monkeypatch):
    run = finished_run(tmp_path, "scale")

    def refuse(*arguments, **options):
        raise OSError(30, "Read-only file system", str(run.folder))

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    said = refused(capsys, "export", run.folder)
    assert "Read-only file system" in said
    assert "Make room" not in said


def process(recipe: Path, *arguments: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m yarn_tune {' '.join(arguments)} {shell}"
    kept = {k: v for k, v in os.environ.items() if k not in environment} | {k: v for k, v in environment.items() if v}
    kept["PYTHONPATH"] = ROOT
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=recipe.parent, env=kept, timeout=300
    )


def test_a_reader_that_ends(recipe):
    done = process(recipe, "recipes", shell="| head -c 1")
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_full_device_for_the_output(recipe):
    done = process(recipe, "recipes", shell="> /dev/full; echo $?")
    assert "Traceback" not in done.stderr
    assert "No space left on device; make room" in done.stderr


def test_without_a_home(recipe):
    """As under a UID that has no passwd entry, where the home folder cannot be found."""
    code = (
        "import os, pathlib, sys; os.environ.pop('HOME', None); os.environ.pop('YARN_TUNE_CACHE', None)\n"
        "import pwd; pwd.getpwuid = lambda uid: (_ for _ in ()).throw(KeyError(uid))\n"
        "from yarn_tune.cli import main\n"
        "sys.exit(main(['train', 'recipe.yaml', 'train.steps=1', 'name=homeless']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=recipe.parent,
        timeout=300,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    assert done.returncode in (0, 2), done.stderr[-3000:]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("delay", [0.3, 1.0, 3.0])
def test_ctrl_c_while_importing(recipe, delay):
    command = [sys.executable, "-m", "yarn_tune", "plan", "recipe.yaml"]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    started = subprocess.Popen(
        command, cwd=recipe.parent, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    time.sleep(delay)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=120)
    assert "yarn_tune/cli" not in said, said
    # Python ends with 1 when it is interrupted before it runs its first module.
    assert started.returncode in ((130,) if "yarn-tune: interrupted" in said else (0, 1, -signal.SIGINT)), said


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_importing_raises_nothing_in_the_import(recipe, number, code):
    """PyTorch's C++ code calls Python when it is loaded, and an exception there aborts the process with SIGABRT."""
    (recipe.parent / "loaded.py").write_text(
        f"import os, signal\ntry:\n    os.kill(os.getpid(), signal.{number})\n    sum(range(100))\n"
        "except BaseException:\n    os.abort()\n"
    )
    script = (
        "import signal, sys\nfrom importlib import import_module\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # the tests may run in a background job
        "cli = import_module('yarn_tune.cli.main')\n"
        "cli._run = lambda arguments: __import__('loaded')\n"
        "sys.exit(cli.main(['plan', 'recipe.yaml']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{recipe.parent}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert done.stderr == f"yarn-tune: interrupted by {number} while starting\n"


def test_an_ignored_ctrl_c_stays_ignored(recipe):
    """A shell starts its background jobs with SIGINT ignored."""
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from importlib import import_module\n"
        "cli = import_module('yarn_tune.cli.main')\n"
        "cli._run = lambda arguments: os.kill(os.getpid(), signal.SIGINT) or 0\n"
        "sys.exit(cli.main(['plan', 'recipe.yaml']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": ROOT}
    assert subprocess.run([sys.executable, "-c", script], env=environment, timeout=120).returncode == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("json"), "scale")


@pytest.mark.parametrize("name", ["metrics.jsonl", "learned.json", "compare.json", "retrieval.json", "earlier.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"3", b"\xff", b'{"sha256": 1}', b"[" * 100_000])
def test_damaged_json_in_a_run_folder(finished, capsys, name, content):
    path = finished.folder / name
    path.write_bytes(content)
    try:
        assert main(["compare", str(finished.folder)]) in (0, 2)
        assert main(["export", str(finished.folder)]) in (0, 2)
    finally:
        path.unlink(missing_ok=True)
    assert "Traceback" not in capsys.readouterr().err
