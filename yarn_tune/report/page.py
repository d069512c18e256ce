"""report.html: one self-contained page of a comparison, readable offline, with nothing loaded from elsewhere."""

import base64
import dataclasses
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..evaluation import CompareRow, Comparison, Retrieval, TextResult
from ..recipe import Recipe
from ..runs import TunedRow
from .example import Example, example_html
from .pictures import colours_of
from .strips import strips_html

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
dl.verdict { border-left: 4px solid #0072b2; padding: .2rem 1rem; background: #f4f8fb; }
dt { font-weight: 600; } dd { margin: 0 0 .6rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.best { font-weight: 700; }
.strips { display: flex; flex-wrap: wrap; gap: 1.2rem; } .strips figure { margin: 0; }
figcaption { font-weight: 600; font-size: .9rem; margin-bottom: .2rem; }
.strip td, .strip th { padding: .25rem .4rem; min-width: 2.4rem; text-align: center; border: 1px solid #fff; }
.strip .beyond { border-left: 3px solid #d55e00; }
blockquote { margin: .6rem 0; padding: .4rem .8rem; background: #f7f7f7; font-size: .9rem; overflow-wrap: anywhere; }
blockquote b { background: #ffe08a; } td.answer { white-space: normal; text-align: left; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: #333; }
.toggles label { margin-right: 1rem; white-space: nowrap; }
img { max-width: 100%; } .note { color: #555; font-size: .9rem; }
"""

SCRIPT = """
document.querySelectorAll('input[data-method]').forEach(box => box.addEventListener('change', () => {
  box.closest('figure').querySelectorAll('g[data-method]').forEach(line => {
    if (line.dataset.method === box.dataset.method) line.style.display = box.checked ? '' : 'none';
  });
}));
"""


@dataclasses.dataclass(frozen=True)
class Finished:
    """What the page shows of a finished run, beside its comparison."""

    tuned: TunedRow
    numbers: int
    """How many numbers were learned."""
    trained_on: str
    """Processes and device of the training; empty if they are not known."""
    pictures: Sequence[tuple[str, Path]] = ()
    """(caption, PNG) to include."""
    example: Example | None = None


def write_page(
    path: Path,
    comparison: Comparison,
    recipe: Recipe,
    needles: dict[str, Retrieval],
    finished: Finished | None = None,
) -> None:
    """Write the page.

    Args:
        path: path of the page.
        comparison: the measurements.
        recipe: recipe of the run.
        needles: method -> its retrieval.
        finished: what is known of the run after training; None if the run is not finished.
    """
    rope, base = recipe.rope, recipe.base
    subtitle = f"{base.model}: {comparison.native} to {comparison.window} tokens, factor "
    subtitle += f"{rope.factor or comparison.window / comparison.native:g}"
    pictures = finished.pictures if finished else ()
    parts = [
        f"<h1>{escape(recipe.name)}</h1><p>{escape(subtitle)}</p>",
        _verdict(comparison),
        strips_html(needles, comparison.native),
        example_html(finished.example) if finished and finished.example else "",
        *(_text(comparison, title, result, n) for n, (title, result) in enumerate(comparison.texts.items())),
        *(_picture(caption, picture) for caption, picture in pictures if picture.is_file()),
        _cost(comparison, finished),
        _recipe(recipe),
    ]
    body = "\n".join(part for part in parts if part)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(recipe.name)}</title><style>{STYLE}</style>"
    page = (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n<script>{SCRIPT}</script></body></html>\n'
    )
    path.write_text(page, encoding="utf-8")


def _verdict(comparison: Comparison) -> str:
    verdict = comparison.verdict()
    lines = {**verdict.lines(), "Prediction": verdict.prediction(between="\n")}
    parts = (f"<dt>{escape(title)}</dt><dd>{escape(line)}</dd>" for title, line in lines.items())
    return f'<dl class="verdict">{"".join(parts)}</dl>'.replace("\n", "<br>")


def _text(comparison: Comparison, title: str, result: TextResult, number: int) -> str:
    """The picture and the table of one kind of text."""
    count = len(result.excerpts)
    return (
        f"<h2>NLL on {escape(title)}</h2>"
        f'<p class="note">Nats per token, {count} excerpts of {comparison.edges[-1]} tokens; lower is better. '
        "Dashed: a native window slid over the document.</p>"
        f"{_chart(comparison, result, number)}{_table(result, comparison.edges)}"
    )


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 380, 52, 170, 12, 40
"""Size and margins of the chart, in SVG units."""


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Position and NLL -> coordinates of the chart."""

    last: int
    low: float
    high: float

    def x(self, position: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * position / self.last

    def y(self, nll: float) -> float:
        """The height of an NLL; negative above the chart, where nothing is drawn."""
        share = (nll - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def _chart(comparison: Comparison, result: TextResult, number: int) -> str:
    """An SVG of NLL by position: values on hover, and a switch per method."""
    edges = comparison.edges
    calm = [r.by_position for r in result.rows if r.kind != "search-free" or r.method == "yarn"]
    values = [value for row in calm or [r.by_position for r in result.rows] for value in row if math.isfinite(value)]
    margin = 0.15 * (max(values) - min(values)) + 0.02
    scale = _Scale(edges[-1], min(values) - margin, max(values) + 2 * margin)
    colours, lines = colours_of([row.method for row in result.rows]), []
    labels = _apart({r.method: scale.y(r.by_position[-1]) for r in result.rows if r.by_position[-1] < scale.high})
    for row in result.rows:
        lines.append(_line(row, edges, scale, colours[row.method], labels.get(row.method)))
    native = scale.x(comparison.native)
    ground = HEIGHT - BOTTOM
    axes = [
        f'<line x1="{native:.1f}" x2="{native:.1f}" y1="{TOP}" y2="{ground}" stroke="#999" stroke-dasharray="2 3"/>',
        f'<text x="{native + 4:.1f}" y="{ground - 6}">native window, {comparison.native}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">'
        "position in the document (tokens)</text>",
    ]
    for edge in edges[:: max(1, (len(edges) - 1) // 8)]:
        axes.append(f'<text x="{scale.x(edge):.1f}" y="{ground + 16}" text-anchor="middle">{edge}</text>')
    for step in range(5):
        value = scale.low + (scale.high - scale.low) * step / 4
        y = scale.y(value)
        axes.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e5e5"/>')
        axes.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    boxes = "".join(
        f'<label style="color:{colours[row.method]}"><input type="checkbox" checked data-method="{escape(row.method)}"'
        f' id="t{number}-{place}"> {escape(row.method)}</label>'
        for place, row in enumerate(result.rows)
    )
    size = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{ground - TOP}"'
    clip = f'<clipPath id="plot"><rect {size}/></clipPath>'
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{clip}{"".join(axes)}{"".join(lines)}</svg>'
    return f'<figure style="margin:0">{drawing}<div class="toggles">{boxes}</div></figure>'


def _line(row: CompareRow, edges: list[int], scale: _Scale, colour: str, label: float | None) -> str:
    centres = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    points = [
        (scale.x(c), scale.y(v), a, b, v)
        for c, v, a, b in zip(centres, row.by_position, edges, edges[1:], strict=False)
        if math.isfinite(v)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in points)
    dash = ' stroke-dasharray="6 4"' if row.kind == "slid" else ""
    width = 3 if row.kind == "learned" else 1.6
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{escape(row.method)}, {a} to {b - 1}: '
        f"{value:.3f}</title></circle>"
        for x, y, a, b, value in points
    )
    name = escape(row.method)
    place = 0.0 if label is None else label + 4
    text = f'<text x="{WIDTH - RIGHT + 8}" y="{place:.1f}" style="fill:{colour}">{name}</text>'
    return (
        f'<g data-method="{name}"><g clip-path="url(#plot)"><polyline points="{path}" fill="none" stroke="{colour}" '
        f'stroke-width="{width}"{dash}/>{dots}</g>{"" if label is None else text}</g>'
    )


def _apart(places: dict[str, float], gap: float = 15.0) -> dict[str, float]:
    """Move the heights of labels apart, from the bottom of the picture upwards."""
    found, lowest = {}, math.inf
    for name, place in sorted(places.items(), key=lambda item: -item[1]):
        lowest = min(place, lowest - gap)
        found[name] = lowest
    return found


def _table(result: TextResult, edges: list[int]) -> str:
    """All figures, the best one of each column in bold."""
    base = result.base_short_nll()
    titles = ["method", "mean", "short texts", "key tokens", "needles"]
    titles += [f"{a} to {b - 1}" for a, b in zip(edges, edges[1:], strict=False)]
    values = {  # the smaller the better
        row.method: [
            row.longest,
            row.short_nll - base,
            row.key_nll,
            None if row.retrieved is None else -row.retrieved[0],
            *row.by_position,
        ]
        for row in result.rows
    }
    best = [min((v for v in column if v is not None), default=None) for column in zip(*values.values(), strict=True)]
    lines = [_cells(titles, "th")]
    for method, own in values.items():
        texts = ["-" if value is None else f"{value:.3f}" for value in own]
        texts[1] = f"{own[1]:+z.3f}"
        texts[3] = "-" if own[3] is None else f"{-own[3]:.0%}"
        marks = [value is not None and value == top for value, top in zip(own, best, strict=True)]
        lines.append(_cells([method, *texts], "td", [False, *marks]))
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _cells(texts: Iterable[str], tag: str, best: Sequence[bool] = ()) -> str:
    marks = list(best) or [False] * 100
    cells = (f"<{tag}{' class=best' * mark}>{escape(text)}</{tag}>" for text, mark in zip(texts, marks, strict=False))
    return f"<tr>{''.join(cells)}</tr>"


def _cost(comparison: Comparison, finished: Finished | None) -> str:
    measured = sum(row.seconds for result in comparison.texts.values() for row in result.rows)
    rows = {"measuring the NLL of all rows": f"{measured:,.0f} seconds"}
    if finished is not None:
        tuned, on = finished.tuned, f", {finished.trained_on}" if finished.trained_on else ""
        rows = {
            "numbers learned": f"{finished.numbers:,}",
            "tokens read in training": f"{tuned.tokens:,}",
            "training": f"{tuned.seconds:,.0f} seconds{on}",
        } | rows
    lines = "".join(_cells(pair, "td") for pair in rows.items())
    return f"<h2>Cost</h2><table>{lines}</table>"


def _picture(caption: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<h2>{escape(caption)}</h2><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'


def _recipe(recipe: Recipe) -> str:
    """The settings that are not defaults."""
    lines = [_cells(["setting", "value", "default"], "th")]
    for name, value, default in changed_settings(recipe):
        lines.append(_cells([name, str(value), default], "td"))
    return f'<h2>Recipe</h2><div class="scroll"><table>{"".join(lines)}</table></div>'


def changed_settings(section: Any, prefix: str = "") -> list[tuple[str, Any, str]]:
    """(key, value, default) of every setting of a recipe that has no default or another value."""
    found: list[tuple[str, Any, str]] = []
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), f"{prefix}{field.name}"
        default = field.default_factory() if callable(field.default_factory) else field.default
        if dataclasses.is_dataclass(value):
            found += changed_settings(value, f"{name}.")
        elif default is dataclasses.MISSING:
            found.append((name, value, "required"))
        elif value != default:
            found.append((name, value, "null" if default is None else str(default)))
    return found
