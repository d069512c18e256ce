"""The command line: parse, call one function, print.

Exit codes: 0 fine, 2 the user's mistake, 3 a check that failed, 130 interrupted, 1 our fault. With `--json` one JSON
object goes to stdout; progress and logs always go to stderr.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckFailed, UserError

if TYPE_CHECKING:
    from .train import Run

Result = tuple[str, dict[str, Any]]
"""What a command prints: text for people, and the object for `--json`."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], Result] = options.command
    try:
        text, value = command(options)
    except UserError as error:
        print(f"yarn-tune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("yarn-tune: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except CheckFailed as error:
        print(f"yarn-tune: check failed: {error}", file=sys.stderr)
        return 3
    if _is_main_process():
        print(json.dumps(value) if options.json else text)
    return 0 if value.get("passed", True) else 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="yarn-tune", description="Extend the window of a frozen RoPE model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[argparse.Namespace], Result], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        return command

    for name, function, text in (
        ("plan", _plan, "what a run will read, cover and cost; trains nothing"),
        ("train", _train, "learn; continues by itself where an interrupted run stopped"),
        ("compare", _compare, "measure every method on the held-out documents"),
        ("export", _export, "write the checkpoint to serve, reload it and compare"),
        ("run", _run, "train, compare, export and report"),
    ):
        command = add(name, function, text)
        command.add_argument("recipe", help="a recipe (.yaml) or a run folder")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="as in train.steps=50")
        if name == "export":
            command.add_argument("--for", dest="stacks", metavar="STACK,...", help="as export.stacks")
            command.add_argument("--fold", choices=["auto", "never", "always"], help="as export.fold")
            command.add_argument("--overrides-only", action="store_true", help="only the JSON for --hf-overrides")
    command = add("verify", _verify, "what each serving stack will make of a checkpoint's config")
    command.add_argument("checkpoint", help="a checkpoint folder or hub id, ours or not")
    command.add_argument("--for", dest="stacks", metavar="STACK,...", help="stacks to check, or `all`")
    command.add_argument("--engine", choices=["vllm"], help="also run the real engine beside transformers")
    command.add_argument("--engine-python", metavar="PYTHON", help="interpreter that has it (YARN_TUNE_VLLM_PYTHON)")
    command = add("eval", _eval, "NLL of a checkpoint by position")
    command.add_argument("checkpoint", help="a checkpoint folder or hub id")
    command.add_argument("documents", nargs="+", help="files, as in data.heldout")
    command.add_argument("--length", type=int, required=True, help="tokens an excerpt")
    command.add_argument("--count", type=int, default=4, help="excerpts")
    command.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    return parser


def _open(options: argparse.Namespace) -> "Run":
    """The run a command is about: from a run folder, or `runs/<name>` of a recipe."""
    from .recipe import load_recipe
    from .train import Run

    path = Path(options.recipe)
    if path.is_dir():
        if not (path / "recipe.yaml").is_file():
            raise UserError(f"{path} is not a run folder: it has no recipe.yaml")
        return Run(load_recipe(path / "recipe.yaml", options.overrides), path)
    recipe = load_recipe(path, options.overrides)
    return Run(recipe, Path("runs") / recipe.name)


def _plan(options: argparse.Namespace) -> Result:
    from .plan import plan

    run = _open(options)
    made = plan(run.recipe)
    return made.text(), {
        "recipe": run.recipe.to_dict(),
        "learned_numbers": made.learned_numbers,
        "cost": asdict(made.cost) if made.cost else None,
        "rows": len(made.rows.rows) if made.rows else None,
        "coverage": asdict(made.coverage) | {"untrained": made.coverage.untrained},
        "notes": made.notes,
    }


def _train(options: argparse.Namespace) -> Result:
    from .train import train

    run = _open(options)
    learned = train(run)
    values = "\n".join(f"  {name} {value:.6g}" for name, value in learned.summary().items())
    return f"learned, in {run.folder}:\n{values}", {"run": str(run.folder), "learned": asdict(learned)}


def _compare(options: argparse.Namespace) -> Result:
    from .compare import as_json, compare, table, tuned_of

    run = _open(options)
    comparison = compare(run, {"tuned": tuned_of(run)} if run.numbers_path.is_file() else {})
    return f"{comparison.verdict()}\n\n{table(comparison)}", {
        "verdict": comparison.verdict(),
        "rows": as_json(comparison),
    }


def _export(options: argparse.Namespace) -> Result:
    from .export import export

    if options.stacks:
        options.overrides.append(f"export.stacks=[{options.stacks}]")
    if options.fold:
        options.overrides.append(f"export.fold={options.fold}")
    run = _open(options)
    path = export(run, options.overrides_only)
    if options.overrides_only:
        overrides = json.loads(path.read_text(encoding="utf-8"))
        text = f"vllm serve {run.recipe.base.model} --hf-overrides '{json.dumps(overrides)}'"
        return text, {"path": str(path), "overrides": overrides}
    fidelity = json.loads((path / "fidelity.json").read_text(encoding="utf-8"))
    differences = fidelity["max_abs_logit_difference"]
    text = f"{path}: reloaded; largest logit difference {max(differences.values()):.1e}\n{_serve_line(path)}"
    return text, {"path": str(path), "max_abs_logit_difference": differences}


def _verify(options: argparse.Namespace) -> Result:
    from .serving.engines import TOLERANCE, ask_vllm
    from .serving.verify import verify

    made = verify(options.checkpoint, options.stacks.split(",") if options.stacks else None)
    text, passed, value = made.text(), made.passed, asdict(made) | {"passed": made.passed}
    if options.engine:
        found = ask_vllm(options.checkpoint, options.engine_python)
        passed = passed and found.worst <= TOLERANCE
        lengths = ", ".join(f"{d:.1e} at {n} tokens" for n, d in found.differences.items())
        text += f"\n\nvLLM itself (window {found.max_model_len}), log-probabilities against transformers: {lengths}"
        value |= {"passed": passed, "vllm": asdict(found)}
    return text, value


def _serve_line(path: Path) -> str:
    window = json.loads((path / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    return f"vllm serve {path} --max-model-len {window}"


def _run(options: argparse.Namespace) -> Result:
    from .compare import as_json, compare, table, tuned_of
    from .export import export
    from .plan import plan
    from .report import write_report
    from .serving.verify import verify
    from .train import train
    from .tunable import Start

    run = _open(options)
    if _is_main_process():
        print(plan(run.recipe).text(), file=sys.stderr)
    train(run)
    if not _is_main_process():
        return "", {}
    tuned = tuned_of(run)
    comparison = compare(run, {"tuned": tuned})
    path = export(run)
    checked = verify(str(path), run.recipe.export.stacks)
    report = write_report(run, comparison, tuned.learned, Start.of_recipe(run.recipe))
    text = (
        f"{comparison.verdict()}\n\n{table(comparison)}\n\nreport   {report}\npicture  "
        f"{run.folder / 'nll_by_position.png'}\nexport   {path}\nverified {', '.join(n.stack for n in checked.lines)}\n"
        f"serve    {_serve_line(path)}"
    )
    return text, {
        "verdict": comparison.verdict(),
        "rows": as_json(comparison),
        "export": str(path),
        "passed": checked.passed,
        "report": str(report),
        "serve": _serve_line(path),
    }


def _eval(options: argparse.Namespace) -> Result:
    from .data import heldout_excerpts
    from .families import load_model, load_tokenizer, to_device
    from .perplexity import Nats, bucket_edges, by_position, full_nats
    from .recipe import parse_recipe

    tree = {
        "name": "eval",
        "base": {"model": options.checkpoint, "dtype": options.dtype},
        "rope": {"window": options.length},
        "data": {"train": ["none"], "heldout": options.documents},
        "eval": {"documents": options.count},
    }
    recipe = parse_recipe(tree, [], "eval")
    model = to_device(load_model(options.checkpoint, dtype=options.dtype))
    excerpts = heldout_excerpts(recipe, load_tokenizer(options.checkpoint), options.length, options.count)
    edges = bucket_edges(options.length, recipe.eval.buckets)
    sums = [Nats(0.0, 0)] * recipe.eval.buckets
    for _, ids in excerpts:
        sums = [a + b for a, b in zip(sums, by_position(full_nats(model, ids), edges), strict=True)]
    total = sum(sums, Nats(0.0, 0))
    lines = [f"{a:>8} to {b - 1:<8} {n.mean:.4f}" for a, b, n in zip(edges, edges[1:], sums, strict=False)]
    text = "\n".join([*lines, f"mean {total.mean:.4f} nats per token over {total.count} tokens"])
    return text, {"edges": edges, "nll": [n.mean for n in sums], "mean": total.mean, "tokens": total.count}


def _is_main_process() -> bool:
    """Whether this process prints; true outside `accelerate launch`."""
    import os

    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
