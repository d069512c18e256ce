"""The heat strip of report.html: needles found by prompt length and depth, one table per method, side by side."""

import math
from collections.abc import Mapping
from html import escape

from ..evaluation import Retrieval
from .summary_picture import NAMES


def strips_html(needles: Mapping[str, Retrieval], native: int) -> str:
    """A section with a strip for each method and task, the interval of each cell on hover; empty without needles."""
    if not needles:
        return ""
    strips = []
    for method, retrieval in needles.items():
        tasks = retrieval.by_task()
        for task, found in tasks.items():
            title = NAMES.get(method, method) + (f", {task}" if len(tasks) > 1 else "")
            strips.append(_strip(title, found, native))
    first = next(iter(needles.values()))
    return (
        "<h2>Hidden numbers found</h2>"
        f'<p class="note">Share of questions answered exactly, in %, {first.prompts()} prompts per method; higher is '
        "better. Columns: prompt length in tokens; rows: depth of the number in the prompt. Right of the orange line "
        "prompts are longer than the native window. Hover for the counts and the interval.</p>"
        f'<div class="strips">{"".join(strips)}</div>'
    )


def _strip(title: str, found: Retrieval, native: int) -> str:
    lengths, depths, shares = found.shares()
    beyond = min((length for length in lengths if length > native), default=0)
    share, low, high = found.accuracy(beyond=native)
    head = "".join(f"<th{_mark(length == beyond)}>{length}</th>" for length in lengths)
    lines = [f"<tr><th>depth</th>{head}</tr>"]
    for depth, row in zip(depths, shares, strict=True):
        pairs = zip(lengths, row, strict=True)
        cells = (_cell(found, (length, depth), part, length == beyond) for length, part in pairs)
        lines.append(f"<tr><td>{depth:.0%}</td>{''.join(cells)}</tr>")
    beyond_text = "" if math.isnan(share) else f": {share:.0%} beyond {native}"
    interval = f"95% interval {low:.0%} to {high:.0%} of {found.prompts(beyond=native)} prompts"
    return (
        f'<figure><figcaption title="{interval}">{escape(title)}{beyond_text}</figcaption>'
        f'<table class="strip">{"".join(lines)}</table></figure>'
    )


def _mark(beyond: bool) -> str:
    return ' class="beyond"' if beyond else ""


def _cell(found: Retrieval, place: tuple[int, float], share: float, beyond: bool) -> str:
    if math.isnan(share):
        return f"<td{_mark(beyond)}>-</td>"
    cells = [cell for cell in found.cells if (cell.length, cell.depth) == place]
    right, asked = sum(cell.right for cell in cells), sum(cell.asked for cell in cells)
    light = 97 - 52 * share
    style = f"background:hsl(203 80% {light:.0f}%);color:{'#fff' if light < 52 else '#1a1a1a'}"
    return f'<td{_mark(beyond)} style="{style}" title="{right} of {asked} prompts">{100 * share:.0f}</td>'
