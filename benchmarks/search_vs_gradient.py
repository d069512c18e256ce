"""Compare evolutionary search with the gradient on the demo: held-out NLL by forward tokens spent.

    python benchmarks/search_vs_gradient.py [--rows 1 4] [--out benchmarks/results]

The search is LongRoPE's (`longrope_search.py`) at its published settings, each candidate judged on `--rows` training
rows. The gradient run uses the demo's recipe; a training token counts as three forward tokens (the forward pass as one,
the backward pass as two). Both learn one factor per pair; the gradient also learns the temperature, which the published
search does not.
Every point is measured with the same held-out documents.
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import torch
from longrope_search import improvements, offsets_of, searched
from safetensors.torch import load_file
from yarn_tune.evaluation import compare
from yarn_tune.models import BaseModel
from yarn_tune.recipe import load_recipe
from yarn_tune.runs import Run, TunedRow
from yarn_tune.training import train
from yarn_tune.tunable import Start, TunableRotary

mpl.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

CLASSIC = (
    "rope.query_gains=none",
    "rope.qk_bias=false",
    "data.needles=0",
    "eval.retrieval=null",
    "data.heldout_unlike=[]",
)
"""Settings that reduce the demo's recipe to one factor per pair and the temperature t."""

BACKWARD = 3
"""Cost of a training step in forward passes."""


def main() -> None:
    """Run what is missing, measure, draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    curves = {"gradient": by_gradient(options.runs / "bench-gradient")}
    for rows in options.rows:
        curves[f"search, {rows} row{'s' * (rows > 1)} a candidate"] = by_search(
            options.runs / f"bench-search-{rows}", rows
        )
    (options.out / "search-vs-gradient.json").write_text(json.dumps(curves, indent=1) + "\n")
    picture(curves, options.out / "search-vs-gradient.png")
    print(json.dumps(curves, indent=1))


def by_gradient(folder: Path) -> list[dict[str, float]]:
    """Points of the gradient at every checkpoint, and search-free YaRN at zero tokens."""
    recipe = load_recipe("recipes/tiny-demo.yaml", [*CLASSIC, "train.keep_checkpoints=20"])
    run = Run(recipe, folder)
    if not run.numbers_path.is_file():
        train(run)
    begin = Start.of(BaseModel(recipe.base).facts, recipe.rope)
    points = {0: {"yarn": None}}
    for path in sorted((folder / "checkpoints").glob("step-*")):
        state = load_file(path / "state.safetensors")
        numbers = {k.removeprefix("numbers."): v for k, v in state.items() if k.startswith("numbers.")}
        points[int(path.name[5:])] = numbers
    tokens = recipe.train.batch_size * recipe.row_tokens() * BACKWARD
    return measured(run, begin, {step * tokens: numbers for step, numbers in points.items()})


def by_search(folder: Path, rows: int) -> list[dict[str, float]]:
    """Points of the search after the generations that improved the best candidate."""
    recipe = load_recipe("recipes/tiny-demo.yaml", list(CLASSIC))
    begin = Start.of(BaseModel(recipe.base).facts, recipe.rope)
    tokens = rows * recipe.row_tokens()
    best = improvements(searched(recipe, folder, rows))
    points = {count * tokens: offsets_of(factors, begin) for count, factors in best.items()}
    return measured(Run(recipe, folder), begin, points)


def measured(run: Run, begin: Start, points: dict) -> list[dict[str, float]]:
    """Held-out NLL of each set of numbers, by tokens spent."""
    tuned = {}
    for tokens, numbers in points.items():
        rotary = TunableRotary(torch.nn.Identity(), begin, "per_pair")
        if "yarn" not in numbers:
            rotary.load_numbers(numbers)
        tuned[f"tuned-{tokens}"] = TunedRow(rotary.learned(), tokens, 0.0)
    found = compare(run, tuned, only=list(tuned))
    longest = max(found.rows[0].nll)
    return [{"tokens": row.tokens_spent, "nll": row.nll[longest], "short_nll": row.short_nll} for row in found.rows]


def picture(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Write a PNG of all curves."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    colours = ["#D55E00", "#009E73", "#0072B2", "#CC79A7"]
    for (name, points), colour in zip(curves.items(), colours, strict=False):
        axes.plot([p["tokens"] / 1e6 for p in points], [p["nll"] for p in points], marker="o", markersize=4,
                  label=name, color=colour)  # fmt: skip
    axes.axhline(curves["gradient"][0]["nll"], color="#999999", linestyle=":", label="search-free YaRN")
    axes.set_xlabel("forward tokens spent (millions; a training token counts three)")
    axes.set_ylabel("held-out NLL at 2048 tokens (nats per token)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
