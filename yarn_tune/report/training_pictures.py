"""Pictures of a run's training: learned factors, gains and phases, loss, and trained distances."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..data import Coverage
from ..rope import ntk_inv_freq
from ..tunable import Learned, Start
from .pictures import COLOURS


def plot_factors(learned: Learned, start: Start, path: Path) -> None:
    """Write a PNG of how far each rotary pair is stretched: learned, YaRN, NTK-aware and position interpolation."""
    base = start.facts.table(start.window)[0]
    pairs = range(len(base))
    ntk = start.over_base(ntk_inv_freq(start.facts.theta, start.facts.dim, start.stretch))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(start.stretch, label="linear (position interpolation)", color=COLOURS["linear"], linestyle="--")
    axes.plot(pairs, (base / ntk).tolist(), label="NTK-aware", color=COLOURS["ntk"], linestyle="-.")
    axes.plot(pairs, (base / start.inv_freq()).tolist(), label="search-free YaRN (the start)", color=COLOURS["yarn"])
    factors = (base / learned.inv_freq()).tolist()
    axes.plot(pairs, factors, label="learned", color=COLOURS["tuned"], marker="o", markersize=3)
    axes.set_title("How far each rotary pair is stretched", fontsize=10, loc="left")
    axes.set_xlabel("rotary pair (0 has the highest frequency)")
    axes.set_ylabel("factor (frequency of the base / new)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_gains(learned: Learned, path: Path) -> None:
    """Write a PNG of the query gains, and of the phases if there are any, by layer, head and rotary pair."""
    assert learned.gains is not None
    layers, groups, pairs = learned.gains.shape
    values = [("query gain (1 is the base)", learned.gains.abs(), 1.0)]
    values += [("query phase in radians (0 is the base)", learned.gains.angle(), 0.0)] * learned.gains.is_complex()
    height = 1.2 + 0.12 * max(6, layers * groups)
    figure = Figure(figsize=(8, height * len(values)), layout="constrained")
    panels = figure.subplots(len(values), 1, squeeze=False)
    for axes, (label, value, middle) in zip(panels[:, 0], values, strict=True):
        reach = max(1e-3, (value - middle).abs().max().item())
        grid = value.reshape(layers * groups, pairs).tolist()
        image = axes.imshow(grid, aspect="auto", cmap="PuOr", vmin=middle - reach, vmax=middle + reach)
        figure.colorbar(image, ax=axes)
        axes.set_title(label, fontsize=10, loc="left")
        axes.set_yticks([layer * groups - 0.5 for layer in range(layers)], [str(layer) for layer in range(layers)])
        axes.set_ylabel(f"layer ({groups} heads each)" if groups > 1 else "layer")
        axes.set_xlabel("rotary pair (0 has the highest frequency)")
    figure.savefig(path, dpi=120)


def plot_steps(lines: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of the training loss and the learned values over the steps of a run, given its records."""
    steps = [line["step"] for line in lines]
    values = [
        name for name in (lines[-1]["learned"] if lines else ()) if all(name in line["learned"] for line in lines)
    ]
    figure = Figure(figsize=(8, 2 + 1.4 * (1 + len(values))), layout="constrained")
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
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(covered.edges[:-1], shares, widths, align="edge", color=COLOURS["yarn"], edgecolor="white")
    axes.set_title("Relative distances in the training rows", fontsize=10, loc="left")
    axes.set_xlim(0, covered.edges[-1])
    axes.set_xlabel("distance between query and key (tokens)")
    axes.set_ylabel("(query, key) pairs (%)")
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=120)
