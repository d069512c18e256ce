"""examples/demo.ipynb runs, shortened, and follows the notebook format."""

import json
import shutil
from pathlib import Path

import matplotlib
import yaml
from tiny import recipe_tree, save_tiny

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "demo.ipynb"


def cells(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_the_notebook_follows_the_format_and_holds_no_output():
    """The keys that format 4.5 requires of a notebook and of its cells."""
    tree = json.loads(NOTEBOOK.read_text())
    assert (tree["nbformat"], tree["nbformat_minor"]) == (4, 5)
    assert tree["metadata"]["kernelspec"]["name"] == "python3"
    for cell in tree["cells"]:
        assert {"id", "cell_type", "metadata", "source"} <= set(cell)
        assert cell["cell_type"] != "code" or (cell["outputs"], cell["execution_count"]) == ([], None)
    assert len({cell["id"] for cell in tree["cells"]}) == len(tree["cells"])


def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    """In one namespace, from the notebook's folder, on a small model in the demo's place."""
    matplotlib.use("agg")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "examples").mkdir()
    shutil.copy(NOTEBOOK, tmp_path / "examples")
    tree = recipe_tree(save_tiny(tmp_path / "base"), tmp_path, steps=1)
    tree["eval"] = {"documents": 1, "methods": [], "retrieval": {"wording": "demo", "per_cell": 1, "depths": [0.5]}}
    (tmp_path / "recipes/tiny-demo.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path / "examples")
    namespace: dict[str, object] = {}
    for number, source in enumerate(cells("code")):
        exec(compile(source, f"cell {number}", "exec"), namespace)
    said = capsys.readouterr().out
    assert (tmp_path / "runs/notebook/export/config.json").is_file()
    assert (tmp_path / "runs/notebook/report.html").is_file()
    assert "learns    " in said
    assert "Prediction: tuned" in said
    assert "all stacks serve it" in said
    assert " tokens; " in said
