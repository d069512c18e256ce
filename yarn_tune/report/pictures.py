"""Pictures of a comparison: NLL by position, and needles found by prompt length and depth. Okabe-Ito colours."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation import CompareRow, Comparison, Retrieval, TextResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

COLOURS = {
    "none": "#999999",
    "native-window": "#000000",
    "linear": "#E69F00",
    "ntk": "#56B4E9",
    "dynamic": "#CC79A7",
    "yarn": "#0072B2",
    "tuned": "#D55E00",
    "native-adapted": "#009E73",
    "abf": "#8B4513",
    "llama3": "#7F7F00",
    "cope": "#5D3FD3",
    "ntk-by-parts": "#66A61E",
}
MORE_COLOURS = ("#D55E00", "#AA3377", "#8B4513", "#B8860B", "#5D3FD3")
"""Colours of further rows, used in turn."""
DIM = "#555555"


def new_figure(size: tuple[float, float]) -> "Figure":
    """An empty figure; `size` is its width and height in inches."""
    from matplotlib.figure import Figure  # not at the top: training and exporting need no matplotlib

    return Figure(figsize=size, layout="constrained")


def colours_of(methods: Sequence[str]) -> dict[str, str]:
    """Method -> colour; `X-slid` has the colour of X."""
    own = [name for name in methods if name not in COLOURS and not name.endswith("-slid")]
    found = COLOURS | {name: MORE_COLOURS[i % len(MORE_COLOURS)] for i, name in enumerate(own)}
    return {name: found.get(name.removesuffix("-slid"), DIM) for name in methods}


def plot_by_position(comparison: Comparison, result: TextResult, title: str, path: Path) -> None:
    """Write a PNG of every method's NLL by position, with the end of the native window marked.

    The axis ends a little above the worst value of the methods that work, since others would flatten the picture.
    """
    edges = comparison.edges
    centres = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    calm = [row for row in result.rows if row.kind != "search-free" or row.method == "yarn"]
    figure = new_figure((8.5, 4.8))
    axes = figure.add_subplot()
    top = position_axes(axes, comparison, calm or result.rows)
    colours = colours_of([row.method for row in result.rows])
    for row in result.rows:
        style = "--" if row.kind == "slid" else "-"
        width = 2.4 if row.kind == "learned" else 1.4
        colour = colours[row.method]
        axes.plot(centres, row.by_position, style, marker="o", markersize=3.5, color=colour, linewidth=width)
    end_labels(axes, [row for row in result.rows if min(row.by_position) <= top], colours)
    above = [row.method for row in result.rows if min(row.by_position) > top]
    note = f" ({', '.join(above)}: above the picture)" if above else ""
    count = len(result.excerpts)
    axes.set_title(f"{title}: NLL by position, {count} excerpts; lower is better{note}", fontsize=10, loc="left")
    axes.set_ylabel("NLL (nats per token)")
    figure.savefig(path, dpi=120)


def position_axes(axes: "Axes", comparison: Comparison, rows: list[CompareRow]) -> float:
    """Set up axes of NLL by position for these rows, with the native window marked; returns the largest NLL shown."""
    low, high = min(min(row.by_position) for row in rows), max(max(row.by_position) for row in rows)
    top: float = high + 0.6 * (high - low) + 0.05
    axes.set_ylim(low - 0.3 * (high - low) - 0.025, top)
    axes.set_xlim(0, comparison.edges[-1])
    axes.axvline(comparison.native, color="#999999", linestyle=":", linewidth=1)
    axes.annotate(
        f"native window, {comparison.native}", (comparison.native, 0.02), xycoords=("data", "axes fraction"),
        xytext=(4, 0), textcoords="offset points", va="bottom", color=DIM, fontsize=8,
    )  # fmt: skip
    axes.set_xlabel("position in the document (tokens)")
    axes.grid(alpha=0.3)
    return top


def end_labels(
    axes: "Axes", rows: list[CompareRow], colours: Mapping[str, str], names: Mapping[str, str] | None = None
) -> None:
    """Write each method's name right of the end of its line, moved apart where lines end close together.

    Args:
        axes: axes with the lines.
        rows: rows whose lines are labelled.
        colours: method -> colour.
        names: method -> name to write; by default the method.
    """
    low, high = axes.get_ylim()
    gap, at = 0.045 * (high - low), float("-inf")
    for row in sorted(rows, key=lambda row: row.by_position[-1]):
        at = max(at + gap, min(row.by_position[-1], high))
        end, place = (1.0, min(row.by_position[-1], high)), (1.02, (at - low) / (high - low))
        name = row.method if names is None else names[row.method]
        axes.annotate(
            name, end, place, xycoords=("axes fraction", "data"), textcoords="axes fraction", va="center",
            color=colours[row.method], fontsize=9, fontweight="bold" if row.kind == "learned" else None,
            annotation_clip=False,
        )  # fmt: skip


def heat_map(retrieval: Retrieval, path: Path, title: str, native: int | None = None) -> None:
    """Write a PNG of the share of right answers by prompt length and depth.

    Args:
        retrieval: the results.
        path: path of the PNG.
        title: title above the picture.
        native: tokens of the base's window; a line separates the longer prompts.
    """
    lengths, depths, _ = retrieval.shares()
    figure = new_figure((2.6 + 0.8 * max(len(lengths), 4), 1.8 + 0.5 * len(depths)))
    axes = figure.add_subplot()
    _, image = draw_shares(axes, retrieval, native)
    if native is not None:
        title += f"\norange line: native window, {native} tokens"
    axes.set_title(f"{title}\n{retrieval.prompts()} prompts; higher is better", fontsize=10)
    axes.set_xticks(range(len(lengths)), list(map(str, lengths)))
    axes.set(xlabel="prompt length (tokens)", ylabel="depth of the needle (%)")
    figure.colorbar(image, label="right answers (%)", format=lambda share, _: f"{100 * share:.0f}")
    figure.savefig(path, dpi=120)


def draw_shares(axes: "Axes", retrieval: Retrieval, native: int | None) -> tuple[list[int], "AxesImage"]:
    """Draw the share of right answers by prompt length and depth, in %, and a line at the native window.

    Returns:
        the prompt lengths from left to right, and the image.
    """
    lengths, depths, shares = retrieval.shares()
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            ink = "white" if share < 0.45 else "black"  # a contrast of 4.3 or more on viridis
            axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", color=ink)
    if native is not None:
        axes.axvline(sum(length <= native for length in lengths) - 0.5, color="#D55E00", linewidth=2.5)
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
    axes.set_xlim(-0.52, len(lengths) - 0.48)
    return lengths, image
