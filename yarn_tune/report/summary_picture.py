"""The picture of a comparison for a README or a model card: needles found as a heat strip, beside NLL by position."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation import Comparison, Retrieval
from .pictures import COLOURS, draw_shares, end_labels, new_figure, position_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {"none": "base", "native-window": "base, native window slid", "yarn": "YaRN", "tuned": "tuned"}
"""Method -> its name in the picture."""
STRIP = ("none", "yarn", "tuned")
"""Methods of the heat strip, from left to right."""


def plot_summary(comparison: Comparison, needles: Mapping[str, Retrieval], path: Path, source: str = "") -> None:
    """Write a PNG: the share of needles found by base, YaRN and tuned model, and their NLL by position.

    Args:
        comparison: the measurements; the rows of `NAMES` that are in it are drawn.
        needles: method -> its retrieval; without any of `STRIP` only the NLL is drawn.
        path: path of the PNG.
        source: text that identifies the measurements, kept in the PNG's metadata under `Source`.
    """
    shown = [name for name in STRIP if name in needles]
    figure = new_figure((5.4 + 2.1 * len(shown), 3.9))
    if shown:
        grid = figure.add_gridspec(1, 2, width_ratios=(2.1 * len(shown) + 0.8, 5.2))
        left, right = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
        panels = left.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, shown, strict=True):
            _strip(axes, needles[name], f"{NAMES[name]}: {_beyond(needles[name], comparison.native):.0%}", comparison)
        panels[0].set_ylabel("depth of the number (%)")
        panels[(len(shown) - 1) // 2].set_xlabel("prompt length (tokens)")
        each, prompts = needles[shown[0]], needles[shown[0]].prompts(beyond=comparison.native)
        left.suptitle(
            f"Hidden numbers found in long text (% of {each.cells[0].asked} prompts per cell; higher is better)\n"
            f"above each strip: share of the {prompts} prompts beyond the native window (orange line)",
            fontsize=9, x=0.01, ha="left",
        )  # fmt: skip
    else:
        right = figure.add_subfigure(figure.add_gridspec(1, 1)[0])
    _positions(right.subplots(), comparison)
    right.suptitle(
        f"NLL by position (nats per token; lower is better)\nmean of {len(comparison.like.excerpts)} held-out excerpts",
        fontsize=9, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(path, dpi=130, metadata={"Source": source, "Software": None})


def _beyond(found: Retrieval, native: int) -> float:
    return found.accuracy(beyond=native)[0]


def _strip(axes: "Axes", found: Retrieval, title: str, comparison: Comparison) -> None:
    """One method's needles by prompt length and depth, with the native window marked."""
    lengths = draw_shares(axes, found, comparison.native)[0]
    axes.set_title(title, fontsize=10, fontweight="bold" if title.startswith("tuned") else None)
    axes.set_xticks(range(len(lengths)), list(map(str, lengths)), fontsize=8)


def _positions(axes: "Axes", comparison: Comparison) -> None:
    """NLL by position of the rows of `NAMES`; the axis ends above the worst row but the base, which leaves it."""
    rows = [row for name in NAMES for row in comparison.like.find(name)]
    top = position_axes(axes, comparison, [row for row in rows if row.method != "none"] or rows)
    centres = [(a + b) / 2 for a, b in zip(comparison.edges, comparison.edges[1:], strict=False)]
    for row in rows:
        style, width = "--" if row.kind == "slid" else "-", 2.4 if row.kind == "learned" else 1.4
        colour = COLOURS[row.method]
        axes.plot(centres, row.by_position, style, marker="o", markersize=3, color=colour, linewidth=width)
    end_labels(axes, [row for row in rows if min(row.by_position) <= top], COLOURS, NAMES)
