"""What other people install or cite: the wheel, CITATION.cff, and the versions of Python."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
"""The environment without the repository on the path."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory) -> Path:
    """`yarn-tune` in a new environment: the wheel, and the dependencies of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-deps", str(wheel)], env=CLEAN, check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # A line of a .pth file extends the path; .pth files in that folder, such as an editable yarn_tune's, do nothing.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin" / "yarn-tune"


def run(command: Path, folder: Path, *words: str) -> str:
    """Output of a command in a folder, without the repository on the path."""
    done = subprocess.run(
        [command, *words], cwd=folder, env=CLEAN, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_package_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packages = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "yarn_tune").rglob("__init__.py")}
    assert packages <= {name.removesuffix("/__init__.py") for name in names if name.endswith("/__init__.py")}
    assert "yarn_tune/py.typed" in names
    assert not [name for name in names if "public-domain/" in name and name.endswith(".gz")]


def test_the_wheel_answers_without_the_repository(command, tmp_path):
    site = subprocess.run(
        [command.with_name("python"), "-c", "import yarn_tune; print(yarn_tune.__file__)"],
        cwd=tmp_path, env=CLEAN, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert site.stdout.startswith(str(command.parents[1]))
    assert run(command, tmp_path, "--version").strip().endswith("0.2.0")
    assert "tiny-demo" in run(command, tmp_path, "recipes")
    assert "vllm" in run(command, tmp_path, "verify", str(ROOT / "data/tiny-base"))


def test_the_wheel_trains_measures_and_exports(command, tmp_path):
    """The demo in an empty folder, for one step."""
    recipe = "recipes/tiny-demo.yaml"
    run(command, tmp_path, "recipes", "--copy", "tiny-demo")
    assert re.search(r"learns +[\d,]+ numbers", run(command, tmp_path, "plan", recipe))
    short = ["train.steps=1", "train.batch_size=1", "train.micro_batch_size=1"]
    measured = ["eval.documents=1", "eval.methods=[]", "eval.lengths=[256]", "eval.retrieval=null"]
    run(command, tmp_path, "train", recipe, *short, *measured, "data.heldout_unlike=[]")
    run(command, tmp_path, "compare", "runs/tiny-demo")
    run(command, tmp_path, "export", "runs/tiny-demo")
    assert (tmp_path / "runs/tiny-demo/report.html").is_file()
    assert (tmp_path / "runs/tiny-demo/export/config.json").is_file()


def test_the_versions_of_python_are_the_documented_ones():
    """pyproject.toml and docs/install.md name the same ones."""
    named = [line.rsplit(" ", 1)[1] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line]
    page = (ROOT / "docs" / "install.md").read_text()
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"
    assert all(f"| {version} |" in page for version in named)


def test_the_citation_is_complete_and_of_this_version():
    """The keys that the Citation File Format 1.2.0 requires, and the version and licence of the package."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["cff-version"] == "1.2.0"
    assert cited["type"] == "software"
    assert all("name" in author or "family-names" in author for author in cited["authors"])
    assert all({"type", "title", "authors"} <= set(each) for each in cited["references"])
    assert cited["license"] == PROJECT["project"]["license"]
    assert cited["version"] in (ROOT / "yarn_tune" / "version.py").read_text()
    assert f"## {cited['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_image_is_made_of_what_is_here():
    """Docker is not run: the Dockerfile names files and extras that exist, and no unknown instruction."""
    text = (ROOT / "Dockerfile").read_text()
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line and not line.startswith("#")]
    known = {"ARG", "FROM", "RUN", "ENV", "COPY", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert {line.split()[0] for line in lines} <= known
    assert lines[0].startswith("ARG BASE=")
    assert "FROM ${BASE}" in lines
    for name in re.findall(r"/opt/yarn_tune/([\w./]+)", text):
        assert (ROOT / name).is_file(), name
    extra = re.search(r"/opt/yarn_tune\[(\w+)\]", text)[1]
    assert extra in PROJECT["project"]["optional-dependencies"]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv*", ".engines", "runs"} <= set(ignored)
    assert not {"recipes", "data", "yarn_tune", "constraints.txt", "pyproject.toml", "README.md"} & set(ignored)
