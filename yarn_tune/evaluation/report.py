"""A run in pictures: NLL by position, needles, learned factors, loss, distances. Colours are the Okabe-Ito set."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

from ..data import Coverage, RowRequest, build_rows
from ..rope import ntk_inv_freq
from ..runs import Run, TunedRow, taught
from ..tunable import Learned, Start
from .recall import of_json as cells_of
from .results import Comparison, table
from .retrieval import heat_map

mpl.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen first)

COLOURS = {
    "none": "#999999",
    "native-window": "#000000",
    "linear": "#E69F00",
    "ntk": "#56B4E9",
    "dynamic": "#CC79A7",
    "yarn": "#0072B2",
    "tuned": "#D55E00",
}

MORE_COLOURS = ("#D55E00", "#009E73", "#8B4513", "#F0E442", "#5D3FD3")
"""For several tuned rows and checkpoints, in turn."""


def write_report(run: Run, comparison: Comparison, tuned: TunedRow, start: Start) -> Path:
    """Write report.md and its pictures into the run folder."""
    recipe, learned = run.recipe, tuned.learned
    plot_by_position(comparison, run.folder / "nll_by_position.png")
    plot_factors(learned, start, run.folder / "factors.png")
    plot_steps(run.folder / "metrics.jsonl", run.folder / "steps.png")
    if learned.gains is not None:
        plot_gains(learned, run.folder / "gains.png")
    rows = build_rows(recipe.data, run.base, RowRequest(recipe.row_tokens(), recipe.rows(), recipe.train.seed))
    plot_coverage(rows.coverage(start.window, recipe.data.lengths), run.folder / "coverage.png")
    values = "\n".join(f"- {name}: {value:.6g}" for name, value in learned.summary().items())
    text = (
        f"# {recipe.name}\n\n{comparison.verdict()}\n\n"
        f"Base `{recipe.base.model}`, native window {start.native}, extended to {start.window} tokens; learned "
        f"`{recipe.rope.frequencies}`{taught(run)} and in {tuned.seconds:.0f} seconds.\n\n"
        f"Nats per token by position on {len(comparison.excerpts)} held-out excerpts:\n\n{table(comparison)}\n\n"
        f"{comparison.by_excerpt()}\n\n"
        "`short tax`: change inside the native window against the base. `key tokens`: mean over tokens that need far "
        "context. `retrieved`: needles found in prompts longer than the native window.\n\n"
        f"![NLL by position](nll_by_position.png)\n\n{_retrieval(run, comparison)}"
        f"## Learned\n\n{values}\n\n![factor per rotary pair](factors.png)\n\n"
        f"{'' if learned.gains is None else '![gain per layer, head and pair](gains.png)' + chr(10) * 2}"
        "![loss and temperature](steps.png)\n\n"
        "## Positions\n\nWhich relative distances the rows trained:\n\n![coverage](coverage.png)\n"
    )
    path = run.folder / "report.md"
    path.write_text(text, encoding="utf-8")
    return path


def _retrieval(run: Run, comparison: Comparison) -> str:
    """A heat map of every method that was asked for needles."""
    asked = [row for row in comparison.rows if row.retrieved is not None]
    if not asked:
        return ""
    cells = json.loads((run.folder / "retrieval.json").read_text(encoding="utf-8"))
    parts = ["## Retrieval\n"]
    for row in asked:
        name = f"retrieval-{row.method}.png"
        heat_map(cells_of(cells[row.method]["cells"]), run.folder / name, row.method, comparison.native)
        share, low, high = row.retrieved or (0.0, 0.0, 1.0)
        parts.append(
            f"{row.method}: {share:.0%} beyond the native window (95% interval {low:.0%} to {high:.0%})\n\n"
            f"![retrieval, {row.method}]({name})\n"
        )
    return "\n".join(parts) + "\n"


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_by_position(comparison: Comparison, path: Path) -> None:
    """NLL of every method by position bucket, the native window marked."""
    edges = comparison.edges
    centres = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    figure, axes = plt.subplots(figsize=(8, 4.5))
    # Methods that fall apart would flatten the rest, so the axis ends a little above the calm ones' worst bucket.
    calm = [r.by_position for r in comparison.rows if r.method not in ("none", "linear", "ntk", "dynamic")]
    low, high = min(map(min, calm)), max(map(max, calm))
    margin = 0.6 * (high - low) + 0.05
    axes.set_ylim(low - margin / 2, high + margin)
    others = [row.method for row in comparison.rows if row.method not in COLOURS]
    colours = COLOURS | {name: MORE_COLOURS[i % len(MORE_COLOURS)] for i, name in enumerate(others)}
    for row in comparison.rows:
        above = min(row.by_position) > high + margin
        axes.plot(
            centres, row.by_position, marker="o", markersize=4, color=colours[row.method],
            label=f"{row.method} (above)" if above else row.method,
            linestyle="--" if row.method == "native-window" else "-",
            linewidth=2.4 if row.method == "tuned" else 1.5,
        )  # fmt: skip
    axes.axvline(comparison.native, color="#999999", linestyle=":", linewidth=1)
    axes.annotate(
        "native window", (comparison.native, 0.02), xycoords=("data", "axes fraction"), fontsize=8,
        xytext=(4, 0), textcoords="offset points", va="bottom", color="#555555",
    )  # fmt: skip
    axes.set_xlim(0, edges[-1])
    axes.set_xlabel("position in the document (tokens)")
    axes.set_ylabel("NLL (nats per token)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_factors(learned: Learned, start: Start, path: Path) -> None:
    """How far each rotary pair is stretched: learned, YaRN's start, position interpolation."""
    base = start.facts.table(start.window)[0]
    figure, axes = plt.subplots(figsize=(8, 4))
    pairs = range(len(base))
    axes.plot(pairs, (base / start.inv_freq()).tolist(), label="YaRN (start)", color=COLOURS["yarn"])
    axes.plot(
        pairs,
        (base / learned.inv_freq()).tolist(),
        label="learned",
        color=COLOURS["tuned"],
        marker="o",
        markersize=3,
    )
    ntk = start.over_base(ntk_inv_freq(start.facts.theta, start.facts.dim, start.stretch))
    axes.plot(pairs, (base / ntk).tolist(), label="NTK-aware", color=COLOURS["ntk"], linestyle="-.")
    axes.axhline(start.stretch, label="linear (PI)", color=COLOURS["linear"], linestyle="--")
    axes.set_xlabel("rotary pair (0 turns fastest)")
    axes.set_ylabel("factor (old frequency / new)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_gains(learned: Learned, path: Path) -> None:
    """Gain of the queries (1 / temperature) by layer and head, and by rotary pair; phases below, if there are any."""
    assert learned.gains is not None
    layers, groups, pairs = learned.gains.shape
    phases = learned.gains.is_complex()
    values = [("gain (1 is the base)", learned.gains.abs(), 1.0)]
    values += [("phase (rad)", learned.gains.angle(), 0.0)] if phases else []
    height = 1.2 + 0.12 * max(6, layers * groups)
    figure, panels = plt.subplots(len(values), 1, figsize=(8, height * len(values)), squeeze=False)
    for axes, (label, value, middle) in zip(panels[:, 0], values, strict=True):
        reach = max(1e-3, (value - middle).abs().max().item())
        grid = value.reshape(layers * groups, pairs).tolist()
        image = axes.imshow(grid, aspect="auto", cmap="PuOr", vmin=middle - reach, vmax=middle + reach)
        figure.colorbar(image, ax=axes, label=label)
        axes.set_yticks([layer * groups - 0.5 for layer in range(layers)], [str(layer) for layer in range(layers)])
        axes.set_ylabel(f"layer ({groups} heads each)" if groups > 1 else "layer")
        axes.set_xlabel("rotary pair (0 turns fastest)")
    _save(figure, path)


def plot_steps(metrics: Path, path: Path) -> None:
    """Training loss and learned values over steps."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line["step"] for line in lines]
    values = [name for name in lines[-1]["learned"] if all(name in line["learned"] for line in lines)]
    figure, panels = plt.subplots(1 + len(values), 1, figsize=(8, 2 + 1.4 * (1 + len(values))), sharex=True)
    panels[0].plot(steps, [line["loss"] for line in lines], color=COLOURS["yarn"])
    panels[0].set_ylabel("loss\n(nats per token)")
    for axes, name in zip(panels[1:], values, strict=True):
        axes.plot(steps, [line["learned"][name] for line in lines], color=COLOURS["tuned"])
        axes.set_ylabel(name.replace("_", "\n"))
    panels[-1].set_xlabel("step")
    for axes in panels:
        axes.grid(alpha=0.3)
    _save(figure, path)


def plot_coverage(covered: Coverage, path: Path) -> None:
    """Share of the trained (query, key) pairs by relative distance."""
    figure, axes = plt.subplots(figsize=(8, 3))
    widths = [high - low for low, high in zip(covered.edges, covered.edges[1:], strict=False)]
    total = sum(covered.pairs) or 1
    shares = [100 * pairs / total for pairs in covered.pairs]
    axes.bar(covered.edges[:-1], shares, widths, align="edge", color=COLOURS["yarn"], edgecolor="white")
    axes.set_xlim(0, covered.edges[-1])
    axes.set_xlabel("relative distance between query and key (tokens)")
    axes.set_ylabel("pairs trained (%)")
    axes.grid(alpha=0.3, axis="y")
    _save(figure, path)
