"""Format results for a terminal of 80 columns."""

import math
import os
import sys
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..evaluation import CompareRow, Comparison, TextResult, Verdict
    from ..serving import Verification

Cell = tuple[float | None, str]
"""A value, None if there is none, and its text; the lowest value of a column is the best."""

TITLES = ("method", "mean NLL", "short texts", "far tokens", "needles")
LEGEND = (
    "* best. NLL in nats per token. short texts: change inside the native window;\n"
    "far tokens: tokens that need far context; needles: share found beyond it."
)


WIDTH = 80
"""Columns of a terminal that every table fits."""
PLAN_INDENT = 12
"""Columns of the names of facts in a plan."""


def is_terminal() -> bool:
    """Whether results go to a terminal that may show colour (https://no-color.org)."""
    return _is_terminal() and "NO_COLOR" not in os.environ


def _is_terminal() -> bool:
    return sys.__stdout__ is not None and sys.__stdout__.isatty()


def summary(comparison: "Comparison", colour: bool | None = None) -> str:
    """Format the rows of a comparison in at most 80 columns, the best cell of each column marked.

    Args:
        comparison: the comparison; each kind of text gets a table.
        colour: whether the best cells are bold; None: only on a terminal.
    """
    colour = is_terminal() if colour is None else colour
    parts = [_table(comparison.like, colour)]
    if comparison.unlike is not None:
        parts = [f"{title}:\n{_table(result, colour)}" for title, result in comparison.texts.items()]
    return "\n\n".join([*parts, LEGEND])


def plan_summary(text: str, terminal: bool | None = None) -> str:
    """Break the lines of a plan that are wider than 80 columns, with the further ones below the second column.

    Args:
        text: the plan.
        terminal: whether it goes to a terminal; elsewhere it has one line a fact. None: find out.
    """
    if not (_is_terminal() if terminal is None else terminal):
        return text
    return "\n".join(filled(line, PLAN_INDENT) if len(line) > WIDTH else line for line in text.splitlines())


def verdict_summary(verdict: "Verdict") -> str:
    """The three statements of a verdict, each broken into lines of at most 80 columns."""
    return "\n".join(filled(line) for line in str(verdict).splitlines())


def summary_cells(result: "TextResult") -> list[tuple[str, list[tuple[str, bool]]]]:
    """Return (method, [(text, whether it is the best of its column)]) for each row, the columns as in `TITLES`."""
    base = result.base_short_nll()
    columns: list[Callable[[CompareRow], Cell]] = [
        lambda row: (row.longest, f"{row.longest:.3f}"),
        lambda row: (None, "-") if math.isnan(base) else (row.short_nll - base, f"{row.short_nll - base:+z.3f}"),
        lambda row: (None, "-") if row.key_nll is None else (row.key_nll, f"{row.key_nll:.3f}"),
        lambda row: (None, "-") if row.retrieved is None else (-row.retrieved[0], f"{row.retrieved[0]:.0%}"),
    ]
    cells = [[column(row) for row in result.rows] for column in columns]
    best = [min((value for value, _ in column if value is not None), default=None) for column in cells]
    marked = [
        [(text, value is not None and value == low) for value, text in column]
        for column, low in zip(cells, best, strict=True)
    ]
    return [(row.method, [column[at] for column in marked]) for at, row in enumerate(result.rows)]


def _table(result: "TextResult", colour: bool) -> str:
    rows = summary_cells(result)
    width = max([len("method"), *(len(method) for method, _ in rows)])
    lines = ["  ".join([f"{TITLES[0]:<{width}}", *(f"{title:>11} " for title in TITLES[1:])]).rstrip()]
    for method, cells in rows:
        texts = []
        for text, is_best in cells:
            cell = f"{text:>11}{'*' if is_best else ' '}"
            texts.append(f"\033[1m{cell}\033[0m" if is_best and colour else cell)
        lines.append("  ".join([f"{method:<{width}}", *texts]).rstrip())
    return "\n".join(lines)


def verification_summary(made: "Verification") -> str:
    """Format the check of a checkpoint in at most 80 columns: the table, then the reasons and notes in words.

    Paths, and words longer than a line, are not cut.
    """
    width = max(len("stack"), *(len(line.stack) for line in made.lines))
    rows = [f"{'stack':<{width}}  {'freq. error':>11}  {'multiplier':>10}  {'window':>8}  status"]
    reasons: dict[str, list[str]] = {}
    for line in made.lines:
        error = "-" if line.frequencies is None else f"{line.frequencies:.1e}"
        multiplier = "-" if line.multiplier is None else f"{line.multiplier:.6g}"
        rows.append(f"{line.stack:<{width}}  {error:>11}  {multiplier:>10}  {line.window:>8}  {line.status}")
        if line.problems:
            reasons.setdefault("; ".join(line.problems), []).append(line.stack)
    notes = [f"{', '.join(stacks)}: {reason}" for reason, stacks in reasons.items()]
    notes += [*(f"ERROR: {text}" for text in made.errors), *(f"note: {text}" for text in made.traps)]
    parts = [filled(f"{made.checkpoint}: {made.verdict()} (compared with {made.reference})"), "", *rows]
    return "\n".join([*parts, *([""] if notes else []), *(filled(note) for note in notes)])


def filled(text: str, indent: int = 2) -> str:
    """Break a paragraph into lines of at most 80 columns, the further ones indented; words are not cut."""
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
