"""report.md and report.html of a comparison: verdict, tables and pictures."""

import sys
from pathlib import Path

from ..errors import UserError
from ..evaluation import Comparison, load_records, tables
from ..files import locked, read_json, read_tensors, write_atomically
from ..runs import Run, TunedRow, read_metrics, training_costs, tuned_row
from ..training import split_rows
from ..tunable import Start
from .example import example_or_note
from .page import Finished, write_page
from .pictures import heat_map, plot_by_position
from .summary_picture import plot_summary
from .training_pictures import plot_coverage, plot_learned, plot_steps

COLUMNS = (
    "NLL is in nats per token; lower is better. `short tax`: change inside the native window against the base. "
    "`key tokens`: mean over tokens that need far context. `retrieved`: share of needles found in prompts longer than "
    "the native window. `native-window`: the base evaluated with a sliding window of its native length. `tuned-slid`: "
    "the tuned model evaluated in the same way."
)


def report_run(run: Run) -> Path:
    """Write the report of a run folder from its compare.json; returns the path of report.html.

    Raises:
        UserError: if there is no comparison yet, or another process writes in the folder.
    """
    comparison = Comparison.load(run.folder / "compare.json")
    return write_report(run, comparison, tuned_row(run) if run.numbers_path.is_file() else None)


def write_report(run: Run, comparison: Comparison, tuned: TunedRow | None) -> Path:
    """Write report.html into the run folder, and for a finished run report.md with its pictures.

    Args:
        run: the run that was compared.
        comparison: the measurements.
        tuned: the run's learned numbers, if it is finished.

    Raises:
        UserError: if another process writes in the folder.
    """
    page = run.folder / "report.html"
    with locked(run.folder):
        records = load_records(run.folder / "retrieval.json")
        measured = {row.method for row in comparison.rows if row.retrieved is not None}
        needles = {name: record.retrieval for name, record in records.items() if name in measured}
        if tuned is not None:
            _write_markdown(run, comparison, tuned)
            plot_summary(comparison, needles, run.folder / SUMMARY_PICTURE)
        write_page(page, comparison, run.recipe, needles, _finished(run, tuned) if tuned else None)
    return page


SUMMARY_PICTURE = "summary.png"
"""Picture of a finished run for a README or a model card."""
PICTURES = {
    "What was learned": "learned.png",
    "Training": "steps.png",
    "Distances in the training rows": "coverage.png",
}
"""Caption -> picture of a finished run that the page includes."""


def _finished(run: Run, tuned: TunedRow) -> Finished:
    """What the page shows of a finished run."""
    numbers = sum(tensor.numel() for tensor in read_tensors(run.numbers_path).values())
    try:
        environment = read_json(run.folder / "environment.json", "")
        trained_on = f"{environment['processes']} process(es) on {environment['device']}"
    except (UserError, KeyError):
        trained_on = ""
    pictures = [(caption, run.folder / name) for caption, name in PICTURES.items()]
    return Finished(tuned, numbers, trained_on, pictures, example_or_note(run, tuned))


def _write_markdown(run: Run, comparison: Comparison, tuned: TunedRow) -> None:
    recipe, learned, start = run.recipe, tuned.learned, Start.of(run.base.facts, run.recipe.rope)
    plot_learned(learned, start, run.folder / "learned.png")
    plot_steps(read_metrics(run.folder), run.folder / "steps.png")
    values = "\n".join(f"- {name}: {value:.6g}" for name, value in learned.summary().items())
    statements = "\n".join(f"- **{title}**: {line}" for title, line in comparison.verdict().lines().items())
    parts = [
        f"# {recipe.name}",
        statements,
        f"Base `{recipe.base.model}`, native window {start.native}, extended to {start.window} tokens; learned "
        f"`{recipe.rope.frequencies}`{training_costs(run)} and in {tuned.seconds:.0f} seconds.",
        tables(comparison),
        COLUMNS,
        *_positions(run, comparison),
        *_retrieval(run, comparison),
        "## Learned",
        values,
        "![what was learned, by rotary pair](learned.png)",
        "![loss and learned values](steps.png)",
        *_coverage(run, start),
    ]
    path = run.folder / "report.md"
    write_atomically(path, ("\n\n".join(parts) + "\n").encode())


def _coverage(run: Run, start: Start) -> list[str]:
    """A picture of the distances in the training rows; nothing where the training documents are not here any more."""
    path = run.folder / "coverage.png"
    try:
        rows, _ = split_rows(run.recipe, run.base)
    except UserError as error:
        print(f"yarn-tune: the report does not show the distances in the training rows: {error}", file=sys.stderr)
        path.unlink(missing_ok=True)
        return []
    plot_coverage(rows.coverage(start.window, run.recipe.data.lengths), path)
    return ["## Positions", "Relative distances in the training rows:", "![coverage](coverage.png)"]


def _positions(run: Run, comparison: Comparison) -> list[str]:
    """A picture of NLL by position for every kind of text."""
    parts = []
    for number, (title, result) in enumerate(comparison.texts.items()):
        name = "nll_by_position.png" if number == 0 else "nll_by_position_unlike.png"
        plot_by_position(comparison, result, title.capitalize(), run.folder / name)
        parts.append(f"![NLL by position, {title}]({name})")
    return parts


def _retrieval(run: Run, comparison: Comparison) -> list[str]:
    """A heat map of every method whose needles were counted."""
    records, parts = load_records(run.folder / "retrieval.json"), ["## Retrieval"]
    counted = [row for row in comparison.rows if row.retrieved is not None and row.method in records]
    if not counted:
        return []
    for row in counted:
        name = f"retrieval-{row.method}.png"
        heat_map(records[row.method].retrieval, run.folder / name, row.method, comparison.native)
        share, low, high = row.retrieved or (0.0, 0.0, 1.0)
        parts.append(
            f"{row.method}: {share:.0%} of {comparison.prompts} needles beyond the native window found (95% interval "
            f"{low:.0%} to {high:.0%})"
        )
        parts.append(f"![retrieval, {row.method}]({name})")
    return parts
