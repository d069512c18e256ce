"""Tables on a terminal: at most 80 columns, the best cells marked, reasons in words below."""

from dataclasses import replace
from pathlib import Path

import pytest
from yarn_tune.cli.terminal import LEGEND, plan_summary, summary, summary_cells, verification_summary
from yarn_tune.evaluation import Comparison
from yarn_tune.serving import verify

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture
def demo():
    return replace(Comparison.load(RESULTS / "tiny-demo-compare.json"), unlike=None)  # one table


def test_the_published_comparison_fits_a_terminal(demo):
    """Numbers as in the table of recipes/README.md."""
    lines = summary(demo, colour=False).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["method", "mean", "NLL", "short", "texts", "far", "tokens", "needles"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1 : len(demo.rows) + 1]}
    assert rows["none"] == ["4.141", "+0.000", "4.707", "0%"]
    assert rows["yarn"] == ["3.309", "+0.132", "2.439", "63%"]
    assert rows["tuned"] == ["3.063*", "-0.087", "1.166*", "100%*"]
    assert "\n".join(lines).endswith(LEGEND)


def test_one_cell_of_a_column_is_the_best(demo):
    marks = [[best for _, best in cells] for _, cells in summary_cells(demo.like)]
    assert [sum(column) for column in zip(*marks, strict=True)] == [1, 1, 1, 1]


def test_the_best_is_bold_where_colour_is_shown(demo):
    assert "\033[1m      3.063*\033[0m" in summary(demo, colour=True)
    assert "\033" not in summary(demo)  # pytest's stdout is no terminal


def test_columns_that_were_not_measured(demo):
    rows = [replace(row, key_nll=None, retrieved=None) for row in demo.like.find("yarn", "tuned")]
    text = summary(replace(demo, like=replace(demo.like, rows=rows)), colour=False)
    tuned = next(line for line in text.splitlines() if line.startswith("tuned"))
    assert tuned.split() == ["tuned", "3.063*", "-", "-", "-"]


def test_two_kinds_of_text_have_a_table_each(demo):
    text = summary(replace(demo, unlike=demo.like), colour=False)
    assert text.count("method ") == 2
    assert "held-out text unlike the training text:" in text


FIELD = Path(__file__).parents[1] / "serving" / "field"


@pytest.mark.parametrize("case", ["12c-kimi-as-deepseek_v3", "13c-phi3-original-missing", "21-factor-bigger"])
def test_the_check_of_a_checkpoint_fits_a_terminal(case, tmp_path):
    """Every stack has its row, and every reason, error and note is there in full."""
    (tmp_path / "config.json").write_text((FIELD / f"{case}.json").read_text())
    made = replace(verify(str(tmp_path), ["all"]), checkpoint="C")  # a path is not broken
    text = verification_summary(made)
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for line in made.lines:
        assert f" {line.stack} " in words
        assert " ".join("; ".join(line.problems).split()) in words
    for note in [*made.errors, *made.traps]:
        assert " ".join(note.split()) in words
    assert words.startswith(f"C: {made.verdict()} (compared with {made.reference})")
    assert words.count(" ok ") == sum(line.status == "ok" for line in made.lines)


def test_a_plan_fits_a_terminal_and_has_one_line_a_fact_elsewhere():
    long = "  learns    " + " ".join(["2593 numbers"] * 20)
    text = f"small: a plan\n{long}\n  rows      136 of 136 rows"
    assert plan_summary(text, terminal=False) == text
    lines = plan_summary(text, terminal=True).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if not line.startswith(" " * 12)] == ["small: a plan", lines[1], lines[-1]]
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
