"""Full fine-tuning of the demo's base under YaRN's table, on the same rows as the lines of `ablation.py`.

    python benchmarks/full_finetuning.py [--rates 1e-4 3e-4 1e-3] [--seeds 0 1 2] [--out benchmarks/results]

All weights are trained by AdamW, with the loss, the rows, the planted questions, the warm-up and the cosine of the line
`phase, needles`. The columns are those of `ablation.py`. A finished run is not repeated.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from ablation import ASKED, SMALL, common_arguments, measured, table
from yarn_tune.distributed import start
from yarn_tune.evaluation import TextResult, compare
from yarn_tune.recipe import load_recipe
from yarn_tune.runs import Run
from yarn_tune.training.batches import Batch, read_rows
from yarn_tune.training.objective import Objective, ObjectiveConfig
from yarn_tune.training.optimizer import rate_share
from yarn_tune.training.preparation import prepare
from yarn_tune.tunable import at_start, detach

Figures = dict[str, float]


def main() -> None:
    """Run what is missing and print the table."""
    parser = common_arguments("runs/full-finetuning")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Figures]] = {}
    for seed in options.seeds:
        for rate in options.rates:
            settings = [*SMALL, *ASKED, f"train.steps={options.steps}", f"train.seed={seed}"]
            run = Run(load_recipe(options.recipe, settings), options.runs / f"{rate:g}_{seed}")
            found.setdefault(f"all weights at {rate:g}, needles", []).append(measure(run, rate))
            (options.out / "full-finetuning.json").write_text(json.dumps(found, indent=1) + "\n")
        print(table(found), flush=True)


def measure(run: Run, rate: float) -> Figures:
    """The values of one line; trains first unless the weights are there."""
    weights = run.folder / "weights"
    if not (weights / "finished").is_file():
        fine_tune(run, rate, weights)
    base = compare(run, {}, only=["none", "native-window", "yarn"])
    # Measured as a base: its row `yarn` is one pass, its native window slid is `own slid`.
    recipe = replace(run.recipe, base=replace(run.recipe.base, model=str(weights)))
    tuned = compare(Run(recipe, run.folder / "measured"), {}, only=["native-window", "yarn"])
    assert base.unlike is not None
    assert tuned.unlike is not None
    both = replace(base, like=beside(base.like, tuned.like), unlike=beside(base.unlike, tuned.unlike))
    numbers = sum(parameter.numel() for parameter in run.base.load().parameters())
    return {"numbers": numbers, **measured(both), "cost": 3.0}  # a backward pass has twice the work of a forward pass


def beside(base: TextResult, tuned: TextResult) -> TextResult:
    """The rows of the base, and those of the tuned weights under the names of a learned run."""
    names = {"yarn": "tuned", "native-window": "tuned-slid"}
    return replace(base, rows=[*base.rows, *(replace(row, method=names[row.method]) for row in tuned.rows)])


def fine_tune(run: Run, rate: float, weights: Path) -> None:
    """Train all weights and save them with the base's own config, which has no scaling."""
    recipe, base = run.recipe, run.base
    settings = recipe.train
    rows, _ = read_rows(recipe, base)
    world = start(recipe.runtime, settings.seed, settings.batch_size, settings.micro_batch_size, run.folder)
    model, rotary = prepare(recipe, base, world, at_start(base, recipe.rope))
    rotary.requires_grad_(False)  # it stays search-free YaRN
    parameters = [p for p in model.parameters() if not any(p is own for own in rotary.parameters())]
    for parameter in parameters:
        parameter.requires_grad_(True)
    objective = Objective(model, rotary, ObjectiveConfig.of(settings, rotary.start.native, rows.prefix))
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_share(step, settings.steps, settings.warmup)
        batch = Batch.of(recipe, rows, step)
        nll = 0.0
        for inputs in batch.micro_batches(world):
            value = objective(**inputs)
            (value[0] / batch.targets).backward()
            nll += value[1].item() / batch.targets
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}/{settings.steps}  NLL {nll:.3f}", flush=True)
    detach(model)
    model.save_pretrained(weights)
    base.tokenizer.save_pretrained(weights)
    (weights / "finished").touch()


if __name__ == "__main__":
    main()
