"""The model card: what a visitor of the hub reads, with the base's licence."""

import re
import shutil

import pytest
import yaml
from tiny import finished_run, write_metrics
from yarn_tune.evaluation.comparison import compare, named_rows
from yarn_tune.export.checkpoint import export
from yarn_tune.export.model_card import licence_from
from yarn_tune.files import read_tensors, save_tensors
from yarn_tune.runs.folder import Run
from yarn_tune.version import __version__


def header(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": "---\nlicense: llama2\nlanguage: en\n---\n# Base\n"}, {"license": "llama2"}),
        (
            {"README.md": "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE.md\n---\n", "LICENSE.md": "x"},
            {"license": "other", "license_name": "own", "license_link": "LICENSE.md"},
        ),
        (
            {"LICENSE": "text", "README.md": "# no header"},
            {"license": "other", "license_name": "as-the-base", "license_link": "LICENSE"},
        ),
        ({}, {"license": "other", "license_name": "as-the-base"}),
    ],
)
def test_the_licence_is_the_bases(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_from(tmp_path) == expected


def test_the_card_has_the_base_the_table_the_command_and_the_limits(tmp_path):
    run = finished_run(tmp_path, "scale", log_temperature=0.1)
    write_metrics(run.folder, 1)
    rows, _ = named_rows(run, [])
    found = compare(run, rows)
    target = export(run)
    text = (target / "README.md").read_text()
    assert header(text)["base_model"] == str(tmp_path / "base")
    assert all(line in text for line in found.verdict().lines().values())
    assert "| tuned |" in text
    assert "--max-model-len 256" in text
    assert "byte for byte" in text
    assert "## Limits" in text
    assert f"version = {{{__version__}}}" in text
    assert header(text)["library_name"] == "transformers"
    assert "(summary.png)" in text
    assert (target / "summary.png").stat().st_size > 5000
    folded = finished_run(tmp_path / "folded", "scale", base=tmp_path / "base", settings=("export.fold=always",),
                          log_temperature=-0.3)  # fmt: skip
    assert "but for the temperature, folded into the queries" in (export(folded) / "README.md").read_text()


def test_the_code_of_the_card_runs(tmp_path, monkeypatch, capsys):
    """The Python as it is, in a folder with a long text; the vLLM command serves the same folder."""
    run = finished_run(tmp_path, "scale", log_temperature=0.1)
    target = export(run)
    text = (target / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long.txt").write_text("w1 w2 w3 " * 40)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(compile(code.replace("THIS-FOLDER", str(target)), "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) == 100
    assert "vllm serve THIS-FOLDER --max-model-len 256" in text


def test_the_card_is_about_its_own_run(tmp_path):
    """The card has no verdict about another run that is better, or about YaRN measured before the training."""
    run = finished_run(tmp_path, "scale", log_temperature=-1.0)
    write_metrics(run.folder, 1)
    better = Run(run.recipe, tmp_path / "better")
    shutil.copytree(run.folder, better.folder)
    numbers = read_tensors(run.numbers_path)
    better.numbers_path.write_bytes(save_tensors({name: 0 * tensor for name, tensor in numbers.items()}))
    compare(run, {})
    assert "## Measured" not in (export(run) / "README.md").read_text()
    rows, _ = named_rows(run, [better.folder])
    assert compare(run, rows).subject() == "tuned-better"
    card = (export(run) / "README.md").read_text()
    assert "**Prediction**: tuned-run, 256 tokens" in card
    assert "**Prediction**: tuned-better" not in card
    assert "summary.png" not in card
