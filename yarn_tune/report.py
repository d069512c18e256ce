"""A run in pictures: NLL by position, learned factors, the loss. Colours are the Okabe-Ito set."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

from .compare import Comparison, table
from .rope import default_inv_freq
from .train import Run
from .tunable import Learned, Start

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


def write_report(run: Run, comparison: Comparison, learned: Learned, start: Start) -> Path:
    """Write report.md and its pictures into the run folder."""
    plot_by_position(comparison, run.folder / "nll_by_position.png")
    plot_factors(learned, start, run.folder / "factors.png")
    plot_loss(run.folder / "metrics.jsonl", run.folder / "loss.png")
    values = "\n".join(f"- {name}: {value:.6g}" for name, value in learned.summary().items())
    recipe = run.recipe
    tokens = recipe.train.steps * recipe.train.batch_rows * recipe.row_tokens()
    text = (
        f"# {recipe.name}\n\n{comparison.verdict()}\n\n"
        f"Base `{recipe.base.model}`, native window {start.native}, extended to {start.window} tokens; learned "
        f"`{recipe.rope.learn}` in {recipe.train.steps} steps, {tokens} tokens.\n\n"
        f"Nats per token by position on {len(comparison.excerpts)} held-out excerpts:\n\n{table(comparison)}\n\n"
        "![NLL by position](nll_by_position.png)\n\n"
        f"## Learned\n\n{values}\n\n![factor per rotary pair](factors.png)\n\n![loss](loss.png)\n"
    )
    path = run.folder / "report.md"
    path.write_text(text, encoding="utf-8")
    return path


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
    calm = [r.by_position for r in comparison.rows if r.method in ("native-window", "yarn", "tuned")]
    low, high = min(map(min, calm)), max(map(max, calm))
    margin = 0.6 * (high - low) + 0.05
    axes.set_ylim(low - margin / 2, high + margin)
    for row in comparison.rows:
        above = min(row.by_position) > high + margin
        axes.plot(
            centres, row.by_position, marker="o", markersize=4, color=COLOURS[row.method],
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
    base = default_inv_freq(start.facts.theta, start.facts.dim)
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
    axes.axhline(start.factor, label="linear (PI)", color=COLOURS["linear"], linestyle="--")
    axes.set_xlabel("rotary pair (0 turns fastest)")
    axes.set_ylabel("factor (old frequency / new)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_loss(metrics: Path, path: Path) -> None:
    """Training loss and temperature over steps."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line["step"] for line in lines]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5), sharex=True)
    top.plot(steps, [line["loss"] for line in lines], color=COLOURS["yarn"])
    top.set_ylabel("loss (nats per token)")
    bottom.plot(steps, [line["learned"]["temperature"] for line in lines], color=COLOURS["tuned"])
    bottom.set_ylabel("temperature t")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    _save(figure, path)
