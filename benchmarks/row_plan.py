"""Compare rows of half the window with whole rows, at twice the cost, in long runs with three seeds.

    python benchmarks/row_plan.py [--seeds 0 1 2] [--out benchmarks/results]

Only gains and phases are learned, on the demo, with needles and four rows per step, as in `ablation.py`, but for enough
steps that the result depends on the rows and not on the number of steps. A finished run is not repeated.
"""

import json

from ablation import ASKED, SMALL, common_arguments, measure, table

FOUR = ("rope.frequencies=fixed", "train.batch_size=4", "train.micro_batch_size=4")
PLANS: dict[str, tuple[int, tuple[str, ...]]] = {
    "rows of 2048, 100 steps": (100, ("data.row_tokens=2048",)),
    "rows of 1024, 140 steps": (140, ("data.row_tokens=1024",)),
}
"""Name -> number of steps, and the settings of the rows."""


def main() -> None:
    """Run what is missing and print the table, in which `cost` is the cost of a whole run."""
    options = common_arguments("runs/row-plan").parse_args()
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
