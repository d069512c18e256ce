"""Rows of half the window against whole rows at twice their cost, learned until little is gained; three seeds.

    python benchmarks/row_plan.py [--seeds 0 1 2] [--out benchmarks/results]

Gains and phases alone on the demo, with questions among the rows, four rows a step: what `ablation.py` has in its last
lines, but for so long that it is the rows that matter and not the steps. A run that is there already is not repeated.
"""

import argparse
import json
from pathlib import Path

from ablation import ASKED, SMALL, measure, table

FOUR = ("rope.frequencies=fixed", "train.batch_size=4", "train.micro_batch_size=4")
PLANS: dict[str, tuple[int, tuple[str, ...]]] = {
    "rows of 2048, 100 steps": (100, ("data.row_tokens=2048",)),
    "rows of 1024, 140 steps": (140, ("data.row_tokens=1024",)),
}
"""Steps, and how rows are read."""


def main() -> None:
    """Run what is missing and print the table; here its cost is that of a whole run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="recipes/tiny-demo.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--runs", type=Path, default=Path("runs/row-plan"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.runs.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PLANS}
    for seed in options.seeds:
        for name, (steps, rows) in PLANS.items():
            folder = f"{name} {seed}".replace(",", "").replace(" ", "_")
            figures = measure(
                options, folder, [*SMALL, *ASKED, *FOUR, *rows, f"train.steps={steps}", f"train.seed={seed}"]
            )
            found[name].append(figures | {"cost": figures["cost"] * steps})
    (options.out / "row-plan.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
