"""Which planted tasks help with tasks that were not trained on: mixtures of `data.needle_tasks` on the demo.

    python benchmarks/planted_tasks.py [--seeds 0 1 2] [--only needle all] [--out benchmarks/results]

Every run is the demo's recipe with 40 steps and another mixture of tasks in a quarter of its rows. The tuned model then
answers questions of every task of `eval.retrieval.tasks` beyond the native window, and questions about one of four
needles. Few of its answers are right as a whole, so the NLL per token of the right answer is measured too. A finished
run is not repeated.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from ablation import common_arguments, spread
from transformers import PreTrainedModel
from yarn_tune.data import TASKS, WORDINGS, Prompt, heldout_tokens, prompt_of
from yarn_tune.evaluation import (
    Method,
    NllCache,
    RetrievalGrid,
    answer_logits,
    compare,
    named_rows,
    search_free_methods,
)
from yarn_tune.recipe import load_recipe
from yarn_tune.runs import Run
from yarn_tune.training import train
from yarn_tune.tunable import Start

EVERY = ("needle", *TASKS)
MIXTURES: dict[str, tuple[str, ...]] = {
    "none": (),
    **{task: (task,) for task in EVERY},
    "keys": ("needle",),
    **{f"all but {task}": tuple(other for other in EVERY if other != task) for task in EVERY},
    "all": EVERY,
}
"""Name -> tasks of the planted questions; those of `keys` are needles among three others."""
KEYS = 4
"""Needles in a question of `keys`."""
LENGTHS = [512, 1024, 2016]
"""Tokens per prompt, all beyond the native window of 256."""

Figures = dict[str, float]


def main() -> None:
    """Run what is missing and print the table."""
    parser = common_arguments("runs/planted-tasks")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", nargs="*", help="mixtures, by name")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Figures]] = {}
    for seed in options.seeds:
        for name in options.only or MIXTURES:
            folder = options.runs / f"{name} {seed}".replace(" ", "_")
            run = Run(load_recipe(options.recipe, settings(name, options.steps, seed)), folder)
            if not found:
                found["search-free YaRN"] = [untrained(run)]
            found.setdefault(name, []).append(trained(run))
            (options.out / "planted-tasks.json").write_text(json.dumps(found, indent=1) + "\n")
        print(table(found), flush=True)


def settings(mixture: str, steps: int, seed: int) -> list[str]:
    """The recipe's settings of a run."""
    tasks = MIXTURES[mixture]
    planted = [f"data.needle_tasks=[{','.join(tasks)}]", "data.needles=0.25"] if tasks else ["data.needles=0"]
    planted += [f"data.needle_keys={KEYS}"] if mixture == "keys" else []
    return [*planted, "eval.retrieval=null", f"train.steps={steps}", f"train.seed={seed}"]


def untrained(run: Run) -> Figures:
    """The values of search-free YaRN."""
    return _kept(run.folder.parent / "yarn.json", run, "yarn")


def trained(run: Run) -> Figures:
    """The values of a run, which is trained first unless it is finished."""
    if not run.numbers_path.is_file():
        train(run)
    return _kept(run.folder / "tasks.json", run, "tuned")


def _kept(path: Path, run: Run, row: str) -> Figures:
    """The values in a file, which is written first unless it exists."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        learned, _ = named_rows(run, [])
        comparison = compare(run, learned, only=[row])
        cache = NllCache(run.base, run.folder / "nll")
        start = Start.of(run.base.facts, run.recipe.rope)
        method = search_free_methods(start, [])["yarn"] if row == "yarn" else Method.of(learned[row].learned)
        values = {"like": comparison.like.rows[0].nll[start.window]}
        if comparison.unlike is not None:
            values["unlike"] = comparison.unlike.rows[0].nll[start.window]
        path.write_text(json.dumps(values | questions(run, cache, method)) + "\n")
    values = json.loads(path.read_text())
    return {name: float(value) for name, value in values.items()}


def questions(run: Run, cache: NllCache, method: Method) -> Figures:
    """Per task, the share of right answers and the NLL per token of the right answer."""
    filler = heldout_tokens(run.recipe.data, run.base).tolist()
    wording = WORDINGS[run.recipe.data.wording]
    grid = RetrievalGrid(LENGTHS, [0.0, 0.25, 0.5, 0.75, 1.0], 4, wording=wording, tasks=EVERY)
    specs = grid.specs()
    keyed = [("keys", replace(spec, keys=KEYS)) for spec in specs if spec.task == "needle"]
    found: dict[str, list[tuple[bool, float]]] = {}
    with method.on(cache.model):
        for name, spec in [*((spec.task, spec) for spec in specs), *keyed]:
            found.setdefault(name, []).append(answered(cache.model, prompt_of(run.base.tokenizer, filler, spec)))
    values: Figures = {}
    for name, results in found.items():
        values[f"{name} right"] = sum(right for right, _ in results) / len(results)
        values[f"{name} nll"] = sum(nll for _, nll in results) / len(results)
    return values


def answered(model: PreTrainedModel, prompt: Prompt) -> tuple[bool, float]:
    """Whether greedy decoding gives the answer, and the mean NLL of the answer's tokens in nats."""
    logits, answer = answer_logits(model, prompt.ids, prompt.answer_ids), torch.tensor(prompt.answer_ids)
    nll = torch.nn.functional.cross_entropy(logits, answer).item()
    if not math.isfinite(nll):
        raise ValueError(f"NLL of an answer: {nll}")
    return bool((logits.argmax(-1) == answer).all()), nll


def table(found: dict[str, list[Figures]]) -> str:
    """The table in Markdown: means over seeds, plus or minus half their range."""
    measured = [*EVERY, "keys"]
    titles = ["planted tasks", "like", "unlike", *measured]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, runs in found.items():
        cells = [spread([one[key] for one in runs], "{:.3f}") for key in ("like", "unlike")]
        for task in measured:
            share = spread([100 * one[f"{task} right"] for one in runs], "{:.0f}", "%")
            cells.append(f"{share}, {spread([one[f'{task} nll'] for one in runs], '{:.2f}')}")
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
