"""Pictures of a run's training: learned factors, gains and phases, loss, and trained distances."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..data import Coverage
from ..recipe import METHODS
from ..tunable import Learned, Start
from .pictures import COLOURS, DIM, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_learned(learned: Learned, start: Start, path: Path) -> None:
    """Write a PNG of what was learned, by rotary pair: stretch, and query gains and phases by layer, if there are any.

    Gains and phases are those of a layer as a whole: the geometric mean of its heads' gains, and the root mean square
    of their phases.
    """
    gains = learned.gains
    panels = 1 + (0 if gains is None else 1 + gains.is_complex())
    height = 0.0 if gains is None else 1.1 + 0.16 * max(4, len(gains))
    sizes = [2.6, *[height] * (panels - 1)]
    figure = new_figure((8, sum(sizes) + 0.3 * panels))
    axes = figure.subplots(panels, 1, squeeze=False, height_ratios=sizes)[:, 0]
    _plot_stretch(axes[0], learned, start)
    if gains is not None:
        mean = gains.abs().log().mean(1).exp()
        _plot_layers(axes[1], mean, "Query gain by layer, mean of the heads (1: as in the base)", middle=1.0)
    if gains is not None and gains.is_complex():
        spread = gains.angle().square().mean(1).sqrt().rad2deg()
        _plot_layers(axes[2], spread, "Query phase by layer, RMS of the heads (degrees; 0: as in the base)")
    figure.savefig(path, dpi=120)


def _plot_stretch(axes: "Axes", learned: Learned, start: Start) -> None:
    """How far each rotary pair is stretched: learned and YaRN, with the wavelengths in tokens."""
    base = start.facts.table(start.window)[0]
    pairs = len(base)
    for name, inv_freq, key, width in (
        (f"{METHODS[start.method]} (start)", start.inv_freq(), "yarn", 1.4),
        ("learned", learned.inv_freq(), "tuned", 2.4),
    ):
        stretch = (base / inv_freq).tolist()
        axes.plot(range(pairs), stretch, color=COLOURS[key], linewidth=width, label=name)
    if (base / start.inv_freq()).max() > 1000:  # CoPE stops the slowest pairs
        axes.set_yscale("log")
    axes.legend(frameon=False, loc="upper left")
    axes.axhline(1.0, color=DIM, linestyle=":", linewidth=1)
    axes.set_title("Stretch of each rotary pair (1: as in the base)", fontsize=10, loc="left")
    shown = range(0, pairs, max(1, pairs // 6))
    lengths = [2 * math.pi / float(base[pair]) for pair in shown]
    axes.set_xticks(list(shown), [f"{pair}\n{_tokens(n)}" for pair, n in zip(shown, lengths, strict=True)])
    axes.set_xlabel("rotary pair, and tokens per turn in the base")
    axes.set_ylabel("times slower")
    axes.set_xlim(-0.5, pairs - 0.5)
    axes.grid(alpha=0.3)


def _tokens(length: float) -> str:
    return f"{length:.0f}" if length < 10_000 else f"{length / 1000:,.0f}K"


def _plot_layers(axes: "Axes", values: Tensor, title: str, middle: float | None = None) -> None:
    """A heat map of values `[layers, pairs]`; colours are centred on `middle` if it is given, else begin at 0."""
    high = values.max().item()
    reach = 1e-3 if middle is None else max(1e-3, (values - middle).abs().max().item())
    limits = (0.0, max(high, 1e-3)) if middle is None else (middle - reach, middle + reach)
    colours = "Purples" if middle is None else "PuOr"
    image = axes.imshow(values.tolist(), aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1])
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_ylabel("layer")
    axes.set_xlabel("rotary pair" if values.shape[1] > 1 else "all rotary pairs alike")


def plot_steps(lines: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of the training loss and the learned values over the steps of a run, given its records."""
    steps = [line["step"] for line in lines]
    values = [
        name for name in (lines[-1]["learned"] if lines else ()) if all(name in line["learned"] for line in lines)
    ]
    figure = new_figure((8, 2 + 1.4 * (1 + len(values))))
    panels = figure.subplots(1 + len(values), 1, sharex=True, squeeze=False)[:, 0]
    panels[0].plot(steps, [line["loss"] for line in lines], color=COLOURS["yarn"])
    panels[0].set_title("Training loss (lower is better) and learned values by step", fontsize=10, loc="left")
    panels[0].set_ylabel("NLL\n(nats per token)")
    for axes, name in zip(panels[1:], values, strict=True):
        axes.plot(steps, [line["learned"][name] for line in lines], color=COLOURS["tuned"])
        axes.set_ylabel(name.replace("_", "\n"))
    panels[-1].set_xlabel("step")
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_coverage(covered: Coverage, path: Path) -> None:
    """Write a PNG of the share of trained (query, key) pairs by relative distance."""
    widths = [high - low for low, high in zip(covered.edges, covered.edges[1:], strict=False)]
    total = sum(covered.pairs) or 1
    shares = [100 * pairs / total for pairs in covered.pairs]
    figure = new_figure((8, 3))
    axes = figure.add_subplot()
    axes.bar(covered.edges[:-1], shares, widths, align="edge", color=COLOURS["yarn"], edgecolor="white")
    axes.set_title("Relative distances in the training rows", fontsize=10, loc="left")
    axes.set_xlim(0, covered.edges[-1])
    axes.set_xlabel("distance between query and key (tokens)")
    axes.set_ylabel("(query, key) pairs (%)")
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=120)
