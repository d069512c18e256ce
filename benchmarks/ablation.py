"""Ablation on the demo: kinds of learned numbers, objectives and row plans, with several seeds each.

    python benchmarks/ablation.py [--steps 40] [--seeds 0 1 2] [--only phase needles] [--control]
                                  [--out benchmarks/results]

Every line is the demo's recipe at a quarter of its batch size with a few settings changed. A finished run is not
repeated. Values are means over seeds, plus or minus half their range:

    NLL, unlike   on held-out text like the training text, and on text of other authors and genres
    own slid      the same tuned model with its native window slid: what it gained without reaching further
    control       the same kinds of numbers learned at the native window, slid (with --control: a second training)
    gap closed    share of the difference between search-free YaRN and the slid native window
    cost          of a step, in forward passes of a whole row, computed as in `yarn-tune plan`; step_cost.py measures it
"""

import argparse
import json
import statistics
from pathlib import Path

from yarn_tune.evaluation import Comparison, compare, load_records, named_rows, save_records
from yarn_tune.models import load_config
from yarn_tune.planning import Shape, estimate_cost
from yarn_tune.recipe import load_recipe
from yarn_tune.runs import Run
from yarn_tune.training import train

SMALL = (
    "rope.query_gains=none",
    "rope.qk_bias=false",
    "data.needles=0",
    "train.batch_size=1",
    "train.micro_batch_size=1",
    "eval.retrieval.per_cell=2",
)
"""Settings that reduce the demo's recipe to one factor per pair, the temperature t, and one row per step."""
PHASE = ("rope.query_gains=pair_phase",)
ASKED = (*PHASE, "data.wording=demo", "data.needles=0.25")
ALONE = ("rope.frequencies=fixed", "train.batch_size=4", "train.micro_batch_size=4")


def _bias(rate: float) -> tuple[str, ...]:
    """Biases of queries and keys with this rate."""
    return "rope.qk_bias=true", f"train.learning_rate.bias={rate}"


def _lora(rate: float) -> tuple[str, ...]:
    """LoRA of rank 8 with this rate."""
    return "lora.rank=8", f"train.learning_rate.lora={rate}"


LINES: dict[str, tuple[str, ...]] = {
    # Kinds of learned numbers, with next-token loss and whole rows.
    "scale and t": ("rope.frequencies=scale",),
    "scale, betas and t": ("rope.frequencies=ramp",),
    "frequency and t": (),
    "+ layer": ("rope.query_gains=layer",),
    "+ head": ("rope.query_gains=head",),
    "+ spectral": ("rope.query_gains=pair",),
    "+ phase": PHASE,
    # Objectives, with factors, t and phases.
    "phase, needles": ASKED,
    "phase, needles, guard 1": (*ASKED, "train.short_context_kl=1.0"),
    "phase, distill": (*PHASE, "train.objective=distill"),
    "phase, distill, needles": (*ASKED, "train.objective=distill"),
    "phase, preserve, needles": (*ASKED, "train.objective=preserve"),
    # Row plans, with factors, t and phases, and needles.
    "phase, needles, staged": (*ASKED, "data.lengths=[512,1024,2048]", "data.order=staged"),
    "phase, needles, mixed": (*ASKED, "data.lengths=[256,2048]"),
    # YaRN's table: only gains and phases are learned, which short rows can train.
    "phase alone, needles": (*ASKED, "rope.frequencies=fixed"),
    "phase alone, needles, rows of 1024": (*ASKED, "rope.frequencies=fixed", "data.row_tokens=1024"),
    "phase alone, needles, rows of 512": (*ASKED, *ALONE, "data.row_tokens=512"),
    "phase alone, needles, rows of 256": (*ASKED, *ALONE, "data.row_tokens=256"),
    # Biases of queries and keys, at several rates.
    **{f"phase, bias {rate}, needles": (*ASKED, *_bias(rate)) for rate in (0.01, 0.05, 0.1)},
    "bias 0.1 alone, needles": (*ASKED, *_bias(0.1), "rope.query_gains=none", "rope.frequencies=fixed"),
    # LoRA at several rates, and beside the other numbers.
    "frequency and t, LoRA 8, needles": (*ASKED, "rope.query_gains=none", "lora.rank=8"),
    **{f"frequency and t, LoRA 8 at {rate}, needles": (*ASKED, "rope.query_gains=none", *_lora(rate)) for rate in
       (0.004, 0.006, 0.01, 0.015)},
    "phase, LoRA 8, needles": (*ASKED, "lora.rank=8"),
    "phase, LoRA 8 at 0.006, needles": (*ASKED, *_lora(0.006)),
    "phase, bias 0.05, LoRA 8 at 0.006, needles": (*ASKED, *_bias(0.05), *_lora(0.006)),
    # Other search-free methods as the start.
    **{f"phase, needles, from {method}": (*ASKED, f"rope.init={method}") for method in ("ntk-by-parts", "abf", "cope")},
}  # fmt: skip


MEASURED = ["none", "native-window", "yarn", "tuned", "tuned-slid", "native-adapted"]
"""Rows of `compare` that the table is made from."""


def main() -> None:
    """Run what is missing and print the table."""
    parser = common_arguments("runs/ablation")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", nargs="*", help="lines, by name")
    parser.add_argument(
        "--control", action="store_true", help="train and measure the native-adapted control of each line"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:  # seed by seed, so that the table of an interrupted run has every line
        for name in options.only or LINES:
            control = f"eval.native_adapted={str(options.control).lower()}"
            settings = [*SMALL, *LINES[name], control, f"train.steps={options.steps}", f"train.seed={seed}"]
            found.setdefault(name, []).append(measure(options, f"{name} {seed}".replace(" ", "_"), settings))
            (options.out / "ablation.json").write_text(json.dumps(found, indent=1) + "\n")
        print(table(found), flush=True)


def common_arguments(runs: str) -> argparse.ArgumentParser:
    """The arguments of every benchmark on runs of the demo, which are kept in the folder `runs`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="recipes/tiny-demo.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--runs", type=Path, default=Path(runs))
    return parser


def measure(options: argparse.Namespace, name: str, settings: list[str]) -> dict[str, float]:
    """Train and compare one run; returns its row of the table."""
    recipe = load_recipe(options.recipe, [*settings, f"name={name}", "train.keep_checkpoints=2"])
    run = Run(recipe, options.runs / name)
    if not run.numbers_path.is_file():
        train(run)
    tuned, _ = named_rows(run, [])
    # Search-free methods are measured once; all runs share the folder of NLL measurements.
    (options.runs / "nll").mkdir(exist_ok=True, parents=True)
    nll = run.folder / "nll"
    if not nll.exists():
        nll.symlink_to((options.runs / "nll").resolve())
    known = options.runs / "retrieval.json"
    if known.is_file() and not (run.folder / "retrieval.json").is_file():
        kept = {method: record for method, record in load_records(known).items() if method in ("none", "yarn")}
        save_records(run.folder / "retrieval.json", kept)
    comparison = compare(run, tuned, only=MEASURED)
    if not known.is_file():
        known.write_text((run.folder / "retrieval.json").read_text())
    return figures(run, comparison)


def figures(run: Run, comparison: Comparison) -> dict[str, float]:
    """The values of one run in the table."""
    numbers = sum(json.loads((run.folder / "learned.json").read_text())["numbers"].values())
    cost = estimate_cost(run.recipe, Shape.of(load_config(run.recipe.base.model)), numbers)
    return {"numbers": numbers, **measured(comparison), "cost": cost.step_flops / cost.forward(comparison.window)}


def measured(comparison: Comparison) -> dict[str, float]:
    """The values that a comparison measured."""
    window = comparison.window
    nll = {row.method: row.nll[window] for row in comparison.rows}
    short = {row.method: row.short_nll for row in comparison.rows}
    more = {"own_slid": nll["tuned-slid"]}
    if "native-adapted" in nll:
        more["control"] = nll["native-adapted"]
    if comparison.unlike is not None:
        unlike = {row.method: row.nll[window] for row in comparison.unlike.rows}
        more |= {"unlike": unlike["tuned"], "yarn_unlike": unlike["yarn"], "slid_unlike": unlike["native-window"]}
    return {
        "nll": nll["tuned"],
        "yarn": nll["yarn"],
        "slid": nll["native-window"],
        "closed": (nll["yarn"] - nll["tuned"]) / (nll["yarn"] - nll["native-window"]),
        "tax": short["tuned"] - short["none"],
        "yarn_tax": short["yarn"] - short["none"],
        "retrieved": (comparison.row("tuned").retrieved or (float("nan"),))[0],
        "yarn_retrieved": (comparison.row("yarn").retrieved or (float("nan"),))[0],
        **more,
    }


COLUMNS: list[tuple[str, str, str, float, str]] = [
    ("NLL", "nll", "{:.3f}", 1, ""),
    ("unlike", "unlike", "{:.3f}", 1, ""),
    ("own slid", "own_slid", "{:.3f}", 1, ""),
    ("control", "control", "{:.3f}", 1, ""),
    ("gap closed", "closed", "{:.0f}", 100, "%"),
    ("short tax", "tax", "{:+.3f}", 1, ""),
    ("retrieved", "retrieved", "{:.0f}", 100, "%"),
]
"""Columns: (title, key of a value, its form, its multiplier, its unit)."""


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """The table of all lines, in Markdown; a column that no run measured is left out."""
    columns = [column for column in COLUMNS if any(column[1] in one for runs in found.values() for one in runs)]
    titles = ["learned, how", "numbers", *(title for title, *_ in columns), "cost"]
    first = next(iter(found.values()))[0]
    nothing = {
        "search-free YaRN": {
            "nll": "yarn", "unlike": "yarn_unlike", "closed": 0.0, "tax": "yarn_tax", "retrieved": "yarn_retrieved",
        },
        "native window, slid": {"nll": "slid", "unlike": "slid_unlike", "closed": 1.0, "tax": 0.0},
    }  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for title, values in nothing.items():
        own = [values.get(column[1]) for column in columns]
        known = [first.get(value) if isinstance(value, str) else value for value in own]
        lines.append(_line(f"nothing: {title}", "0", [[] if v is None else [v] for v in known], columns, ""))
    for name, runs in found.items():
        values_of = [[one[column[1]] for one in runs if column[1] in one] for column in columns]
        lines.append(_line(name, f"{runs[0]['numbers']:.0f}", values_of, columns, f"{runs[0]['cost']:.1f}"))
    return "\n".join(lines)


def _line(
    name: str, numbers: str, values: list[list[float]], columns: list[tuple[str, str, str, float, str]], cost: str
) -> str:
    """One line of the table, from the values of each column."""
    cells = [
        spread([factor * value for value in own], form, unit) if own else ""
        for own, (_, _, form, factor, unit) in zip(values, columns, strict=True)
    ]
    return f"| {' | '.join([name, numbers, *cells, cost])} |".replace("|  |", "| |").replace("|  |", "| |")


def spread(values: list[float], form: str, unit: str = "") -> str:
    """The mean, plus or minus half the range."""
    mean = form.format(statistics.mean(values)) + unit
    half = (max(values) - min(values)) / 2
    return mean if len(values) == 1 else f"{mean} ± {form.replace('+', '').format(half)}"


if __name__ == "__main__":
    main()
