"""The files, commands, families and numbers that the pages name exist and are right."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from test_layers import ORDER
from tiny import recipe_tree, save_tiny
from yarn_tune.cli.parser import parse
from yarn_tune.evaluation.results import Comparison, table
from yarn_tune.recipe.bundled import shipped_recipes
from yarn_tune.recipe.loading import parse_recipe

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import ablation  # noqa: E402
import planted_tasks  # noqa: E402

README = (ROOT / "README.md").read_text()
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "recipes" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
TEXTS = "\n".join(page.read_text() for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for name in re.findall(r"\]\(([\w./-]+)\)", page.read_text()):
        assert (page.parent / name).exists(), name


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def test_every_package_is_in_the_tree_in_the_order_of_imports():
    tree = re.search(r"```\nyarn_tune/\n(.*?)\ntests/", CONTRIBUTING, re.S)[1]
    named = [line.split()[0] for line in tree.splitlines()]
    assert all((ROOT / "yarn_tune" / name).exists() for name in named)
    order = [name for name in ORDER if name not in ("version", "__main__", "__init__")]
    assert [name.rstrip("/").removesuffix(".py") for name in named] == order


def test_every_file_named_in_contributing_exists():
    """In `code`, by its path from the root or from the package."""
    named = re.findall(r"`([\w./]+/[\w.]+\.(?:py|sh|txt|md)|[\w/]+/)`", CONTRIBUTING)
    assert len(named) > 30
    missing = [name for name in named if not (ROOT / name).exists() and not (ROOT / "yarn_tune" / name).exists()]
    assert not missing


def test_every_row_of_where_to_change_what_names_at_most_three_files():
    rows = re.findall(r"^\| an? [^|]+\| (.*) \|$", CONTRIBUTING, re.M)
    assert len(rows) == 6
    assert all(1 <= len(set(re.findall(r"`(yarn_tune/[^`]+)`", row))) <= 3 for row in rows)


def commands() -> list[str]:
    found = re.findall(r"^ {4,8}(yarn-tune .+)$", TEXTS, re.M)
    found += re.findall(r"^\| `(yarn-tune [^`]+)`", TEXTS, re.M)
    return found


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command):
    words = shlex.split(re.sub(r"\[.*?\]", "", command))[1:]
    words = ["5" if word == "N" else word for word in words if word != "..."]
    parse(words)


def test_there_are_commands():
    assert len(commands()) >= 7
    assert "./launch.sh test" in README


def test_launched_recipes_exist():
    texts = f"{TEXTS}\n{(ROOT / 'benchmarks' / 'README.md').read_text()}"
    named = re.findall(r"\./launch\.sh (recipes/[\w.-]+)", texts)
    assert named
    assert all((ROOT / name).is_file() for name in named)


def test_the_recipe_in_the_settings_is_valid():
    text = re.search(r"```yaml\n(.*?)```", SETTINGS, re.S)[1]
    parse_recipe({"name": "readme"} | yaml.safe_load(text), [])


def test_the_python_in_the_settings_runs(tmp_path, monkeypatch):
    """On a small model in the demo's place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    tree = recipe_tree(save_tiny(tmp_path / "base"), tmp_path)
    (tmp_path / "recipes/tiny-demo.yaml").write_text(yaml.safe_dump(tree))
    code = re.search(r"```python\n(from yarn_tune import Tuning.*?)```", SETTINGS, re.S)[1]
    exec(compile(code, "docs/settings.md", "exec"), {})
    assert (tmp_path / "runs/quick/export/config.json").is_file()


def test_the_first_link_out_of_the_readme():
    """At most 120 lines before it; what it is for, how much better, on which models, the cost and the start before."""
    lines = README.splitlines()
    first = next(number for number, line in enumerate(lines) if re.search(r"(?<!\!)\[[^\]]*\]\((?!recipes/tiny)", line))
    assert first <= 120
    early = "\n".join(lines[:75])
    for title in ("**What you get**", "**On which models**", "**At what cost**", "## How much better", "## Quickstart"):
        assert title in early
    assert "Never run: every model of a billion parameters or more, and every GPU" in early


def test_numbers_in_the_prose_of_the_readme():
    """Learned numbers, hours and families are as in the tables."""
    results = (ROOT / "recipes" / "README.md").read_text()
    numbers, hours = re.search(r"`llama-2-7b-32k.yaml` .*\| ([\d,]+) \| ([\d.]+) \|", results).groups()
    families = re.findall(r"^\| \w+ \|", (ROOT / "docs" / "families.md").read_text(), re.M)
    assert f"{numbers} numbers on Llama-2-7B" in README
    assert f"by calculation {hours}\n  hours of one 40 GB GPU" in README
    assert len(families) > int(re.search(r"more than (\d+) families", README)[1])
    assert f"lists all {len(shipped_recipes())}" in README


@pytest.mark.parametrize(
    ("name", "window", "pages"),
    [
        ("smollm2-135m-16k", 16384, ["recipes/README.md"]),
        ("smollm2-135m-32k", 32768, ["recipes/README.md"]),
    ],
)
def test_tables_by_method_are_the_measured_ones(name, window, pages):
    """Their rows are those of the published run's compare.json."""
    found = Comparison.load(ROOT / f"benchmarks/results/{name}-compare.json")
    assert found.window == window
    for page in pages:
        text = (ROOT / page).read_text()
        for result in found.texts.values():
            for line in table(result, found.edges).splitlines():
                assert line in text


@pytest.mark.parametrize("name", ["ablation", "ablation-biases", "full-finetuning", "row-plan"])
def test_tables_of_the_ablation_are_the_measured_ones(name):
    """All but the titles, and the two lines of what nothing was learned for."""
    found = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    text = (ROOT / "recipes/README.md").read_text()
    lines = ablation.table(found).splitlines()[4:]
    assert len(lines) == len(found)
    for line in lines:
        assert line in text


def test_table_of_the_planted_tasks_is_the_measured_one():
    found = json.loads((ROOT / "benchmarks/results/planted-tasks.json").read_text())
    assert set(found) == {"search-free YaRN", *planted_tasks.MIXTURES}
    assert planted_tasks.table(found) in (ROOT / "recipes/README.md").read_text()


def test_license_and_changelog():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "0.2.0" in (ROOT / "CHANGELOG.md").read_text()


def test_the_fast_tests_cover_every_package():
    """Those with tests of their own; tests/launch, tests/engines and tests/benchmarks are the slow ones."""
    listed = (ROOT / "tests" / "fast.txt").read_text()
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")} - {"launch", "engines", "benchmarks"}
    assert folders <= {name for name in ORDER}
    assert not [name for name in sorted(folders) if f"\ntests/{name}" not in listed]
