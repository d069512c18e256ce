"""What the pages show of results is what benchmarks/publish.py writes from benchmarks/results."""

import gzip
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tiny import recipe_tree, save_tiny, write_documents
from yarn_tune.cli.main import main

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import publish  # noqa: E402

BLOCKS = [(page, name) for page, blocks in publish.BLOCKS.items() for name in blocks]
REMEDY = "python benchmarks/publish.py writes it anew"


@pytest.mark.parametrize(("page", "name"), BLOCKS)
def test_every_block_is_the_one_of_the_results(page, name):
    text = (ROOT / page).read_text()
    assert publish.block(text, name)[2] == publish.BLOCKS[page][name](), REMEDY


def test_every_block_of_a_page_is_written_by_the_script():
    for page, blocks in publish.BLOCKS.items():
        assert set(re.findall(r"^<!-- ([\w-]+): ", (ROOT / page).read_text(), re.M)) == set(blocks)


def test_the_picture_is_of_the_results():
    assert Image.open(publish.PICTURE).text["Source"] == publish.source(), REMEDY


def test_the_results_are_of_one_run():
    """The needles by cell add up to the shares of the comparison."""
    records = publish.load_records(publish.RESULTS / publish.DEMO["retrieval.json"])
    found = publish.demo()
    for row in found.rows:
        if row.retrieved is not None:
            assert records[row.method].retrieval.accuracy(beyond=found.native) == pytest.approx(row.retrieved)
            assert records[row.method].retrieval.prompts(beyond=found.native) == found.prompts


def test_the_five_commands_print_what_the_readme_shows(tmp_path, monkeypatch, capsys):
    """On a small model in the place of the demo's; numbers differ."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "data/tiny-base")
    (tmp_path / "data/sample").mkdir()
    for name in ("train", "heldout"):
        path = write_documents(tmp_path / f"data/sample/{name}.jsonl", [5000, 5000, 700], seed=len(name))
        path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    tree = recipe_tree(tmp_path / "data/tiny-base", tmp_path, steps=50)
    tree["eval"] = {"documents": 1, "methods": [], "retrieval": {"wording": "demo", "per_cell": 1, "depths": [0.5]}}
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/tiny-demo.yaml").write_text(yaml.safe_dump({**tree, "name": "tiny-demo"}))
    recorded = {step["command"]: step["output"] for step in json.loads(publish.WALK.read_text())}
    assert list(recorded) == [command for command, _ in publish.FIVE]
    for command, beginnings in publish.FIVE:
        assert main(shlex.split(command)[1:]) == 0
        captured = capsys.readouterr()
        lines = publish.picked(f"{captured.err}\n{captured.out}", beginnings)
        for line, shown in zip(lines, recorded[command], strict=True):
            assert masked(line) == masked(shown)


def masked(line: str) -> str:
    """The words of a line up to its first number or result."""
    return re.split(r"\d|better|worse|too close|finds", line)[0]
