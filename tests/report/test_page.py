"""report.html: complete, self-contained, and with the numbers of the comparison."""

import re
from html.parser import HTMLParser

import pytest
from tiny import recipe_tree, save_tiny
from yarn_tune.cli.main import main
from yarn_tune.errors import UserError
from yarn_tune.evaluation.comparison import compare
from yarn_tune.evaluation.results import CompareRow, Comparison, TextResult
from yarn_tune.evaluation.retrieval import Cell, Retrieval
from yarn_tune.files import read_tensors
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.report.markdown import report_run
from yarn_tune.report.page import changed_settings, write_page
from yarn_tune.runs.folder import Run
from yarn_tune.runs.learned import tuned_row
from yarn_tune.training.loop import train

EDGES = [0, 64, 128, 256]


class Page(HTMLParser):
    """Collects tags with their attributes, and the rows of the tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "input", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def row(method: str, kind: str, values: list[float], **more: object) -> CompareRow:
    mean = sum(values) / len(values)
    return CompareRow(method, kind, {256: mean}, values, values[0], by_excerpt=[mean] * 6, **more)


@pytest.fixture
def page(tmp_path):
    rows = [
        row("none", "search-free", [3.0, 5.0, 9.0], retrieved=(0.0, 0.0, 0.2)),
        row("native-window", "slid", [3.0, 3.1, 3.2]),
        row("yarn", "search-free", [3.4, 3.3, 3.5], retrieved=(0.5, 0.3, 0.7)),
        row("tuned-<b>", "learned", [3.1, 3.0, 3.3], retrieved=(0.9, 0.7, 1.0), key_nll=1.25),
    ]
    comparison = Comparison(64, 256, EDGES, TextResult(["one"] * 6, rows), TextResult(["two"] * 6, rows), prompts=20)
    recipe = parse_recipe(recipe_tree(tmp_path, tmp_path, steps=7), ["eval.retrieval={}"])
    needles = {"yarn": Retrieval([Cell(48, 0.5, 9, 10), Cell(240, 0.5, 5, 10), Cell(240, 0.5, 0, 10, "values")])}
    write_page(tmp_path / "report.html", comparison, recipe, needles)
    return (tmp_path / "report.html").read_text()


def test_nothing_is_loaded_from_elsewhere(page):
    parsed = Page(page)
    for tag, attributes in parsed.tags:
        assert "href" not in attributes
        assert (attributes.get("src") or "data:").startswith("data:")
        assert tag not in ("link", "iframe", "object")
        assert "clip-path" not in attributes or attributes["clip-path"] == "url(#plot)"
    assert "http" not in page
    assert "@import" not in page


def test_tables_have_the_numbers_and_mark_the_best(page):
    parsed = Page(page)
    titles = ["method", "mean", "short texts", "key tokens", "needles", "0 to 63", "64 to 127", "128 to 255"]
    assert parsed.rows.count(titles) == 2
    assert parsed.rows.count(["tuned-<b>", "3.133", "+0.100", "1.250", "90%", "3.100", "3.000", "3.300"]) == 2
    assert parsed.rows.count(["native-window", "3.100", "+0.000", "-", "-", "3.000", "3.100", "3.200"]) == 2
    best = re.findall(r"<td class=best>([^<]*)</td>", page)
    assert best[:8] == ["+0.000", "3.000", "3.100", "+0.000", "3.000", "3.200", "1.250", "90%"]


def test_the_chart_has_a_value_per_point_and_a_switch_per_method(page):
    parsed = Page(page)
    methods = {"none", "native-window", "yarn", "tuned-<b>"}
    for tag in ("input", "g"):
        found = [
            attributes["data-method"] for name, attributes in parsed.tags if name == tag and "data-method" in attributes
        ]
        assert set(found) == methods
        assert len(found) == 2 * len(methods)
    assert page.count("<title>yarn, 128 to 255: 3.500</title>") == 2
    assert sum(tag == "circle" for tag, _ in parsed.tags) == 2 * 4 * 3
    # Along the line a higher NLL is drawn higher (a smaller y), and `none` leaves the plot at the top.
    points = re.search(r'<g data-method="none">.*?points="([^"]*)"', page)[1].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert heights == sorted(heights, reverse=True)
    assert heights[-1] < 0


def test_needles_are_shown_by_length_depth_and_task(page):
    """One strip per task; the counts on hover; the first column beyond the native window is marked."""
    rows = Page(page).rows
    assert ["depth", "48", "240"] in rows
    assert ["50%", "90", "50"] in rows
    assert ["50%", "0"] in rows
    assert re.findall(r"<figcaption[^>]*>([^<]*)<", page) == [
        "YaRN, needle: 50% beyond 64",
        "YaRN, values: 0% beyond 64",
    ]
    assert 'title="95% interval 24% to 76% of 10 prompts"' in page
    assert re.findall(r'<th class="beyond">(\d+)<', page) == ["240", "240"]
    assert 'title="9 of 10 prompts">90<' in page


def test_the_verdict_and_the_changed_settings_are_there(page, tmp_path):
    assert "better than yarn (lower on 6 of 6 excerpts, -0.267, p = 0.031)" in page
    rows = Page(page).rows
    assert ["train.steps", "7", "100"] in rows
    assert ["rope.window", "256", "required"] in rows
    assert not any(cells[0] == "train.seed" for cells in rows if cells)


def test_changed_settings_are_those_that_differ(tmp_path):
    tree = recipe_tree(tmp_path, tmp_path)
    names = {name for name, _, _ in changed_settings(parse_recipe(tree, []))}
    more = {
        name
        for name, _, _ in changed_settings(parse_recipe(tree, ["train.seed=3", "lora={rank: 8}", "eval.buckets=8"]))
    }
    assert more - names == {"train.seed"}


def test_a_runs_report_is_written_from_its_comparison(tmp_path, capsys):
    recipe = parse_recipe(recipe_tree(save_tiny(tmp_path / "base"), tmp_path, steps=1), [])
    run = Run(recipe, tmp_path / "run")
    train(run)
    with pytest.raises(UserError, match="compare.json"):
        report_run(run)
    compare(run, {"tuned": tuned_row(run)})
    assert main(["report", str(run.folder), "--json"]) == 0
    text = (run.folder / "report.html").read_text()
    assert "data:image/png;base64" in text
    assert ["numbers learned", str(sum(len(n.flatten()) for n in read_tensors(run.numbers_path).values()))] in Page(
        text
    ).rows
    assert any(
        cells[0] == "training" and cells[1].endswith("1 process(es) on cpu") for cells in Page(text).rows if cells
    )
    assert str(run.folder / "report.html") in capsys.readouterr().out
    assert (run.folder / "report.md").is_file()


def test_a_report_needs_no_training_documents(tmp_path, capsys):
    """A run that was copied elsewhere is compared on held-out documents."""
    run = Run(parse_recipe(recipe_tree(save_tiny(tmp_path / "base"), tmp_path, steps=1), []), tmp_path / "run")
    train(run)
    compare(run, {"tuned": tuned_row(run)})
    report_run(run)
    assert "coverage.png" in (run.folder / "report.md").read_text()
    (tmp_path / "train.jsonl").unlink()
    report_run(run)
    assert "coverage.png" not in (run.folder / "report.md").read_text()
    assert not (run.folder / "coverage.png").exists()
    assert "does not show the distances in the training rows: data.train" in capsys.readouterr().err
