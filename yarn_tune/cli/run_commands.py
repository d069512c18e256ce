"""What each command does: call one function, say the result in words and as an object.

Imports are inside the functions, so that `yarn-tune --help` and a mistyped recipe need no torch.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .eval_commands import Result, numbers_of

if TYPE_CHECKING:
    from ..api import Tuning


def _open(options: argparse.Namespace) -> "Tuning":
    """The run a command is about: from a run folder, or `runs/<name>` of a recipe."""
    from ..api import Tuning

    return Tuning(options.recipe, options.overrides)


def init_command(options: argparse.Namespace) -> Result:
    """Write a first recipe."""
    from ..files import write_atomically
    from ..planning import propose

    made = propose(
        options.model,
        options.window,
        options.train,
        options.heldout,
        options.gpu_memory,
        options.revision,
        options.gpus,
        options.out,
    )
    path = Path(options.out or f"{made.recipe.name}.yaml")
    if path.exists():
        raise UserError(f"{path} is there already; name another file with --out")
    write_atomically(path, made.text.encode())
    text = f"{made.text}\nwritten to {path}; next: yarn-tune plan {path}"
    return text, {"path": str(path), "recipe": made.recipe.to_dict(), "cost": asdict(made.cost)}


def plan_command(options: argparse.Namespace) -> Result:
    """What a run will read, cover and cost."""
    tuning = _open(options)
    made = tuning.plan()
    return made.text(), {
        "recipe": tuning.run.recipe.to_dict(),
        "learned_numbers": made.learned_numbers,
        "cost": asdict(made.cost) if made.cost else None,
        "rows": len(made.rows.rows) if made.rows else None,
        "coverage": asdict(made.coverage) | {"untrained": made.coverage.untrained},
        "notes": made.notes,
    }


def train_command(options: argparse.Namespace) -> Result:
    """Learn."""
    tuning = _open(options)
    run, learned = tuning.run, tuning.train()
    values = "\n".join(f"  {name} {value:.6g}" for name, value in learned.summary().items())
    return f"learned, in {run.folder}:\n{values}", {"run": str(run.folder), "learned": learned.as_json()}


def compare_command(options: argparse.Namespace) -> Result:
    """Measure every method."""
    from ..evaluation import as_json, check_factors, sweep, sweep_table, table

    options.overrides = [word for word in options.others if "=" in word]
    others = [Path(word) for word in options.others if "=" not in word]
    factors = numbers_of("--factors", options.factors, float) if options.factors else []
    tuning = _open(options)
    check_factors(tuning.run.recipe, factors)
    comparison = tuning.compare(others)
    text = f"{comparison.verdict()}\n\n{table(comparison)}\n\n{comparison.by_excerpt()}".rstrip()
    value: dict[str, Any] = {"verdict": comparison.verdict(), "rows": as_json(comparison)}
    if factors:
        cells = sweep(tuning.run, factors)
        text += f"\n\n{sweep_table(cells)}"
        value["factors"] = [asdict(cell) | {"rise": cell.rise} for cell in cells]
    return text, value


def export_command(options: argparse.Namespace) -> Result:
    """Write the checkpoint to serve."""
    from ..adapter import adapter_recipe, is_adapter
    from ..export import difference_text, export, write_card
    from ..runs import Run

    if options.stacks:
        options.overrides.append(f"export.stacks=[{options.stacks}]")
    if options.fold:
        options.overrides.append(f"export.fold={options.fold}")
    folder = Path(options.recipe)
    adapter = is_adapter(folder)
    run = Run(adapter_recipe(folder, options.overrides), folder) if adapter else _open(options).run
    path = export(run, options.overrides_only)
    if options.overrides_only:
        overrides = json.loads(path.read_text(encoding="utf-8"))
        text = f"vllm serve {run.recipe.base.model} --hf-overrides '{json.dumps(overrides)}'"
        return text, {"path": str(path), "overrides": overrides}
    fidelity = json.loads((path / "fidelity.json").read_text(encoding="utf-8"))
    differences = fidelity["max_abs_logit_difference"]
    write_card(run, path)
    text = f"{path}: reloaded; largest logit difference {difference_text(fidelity)}\n{_serve_line(path)}"
    value = {"path": str(path), "max_abs_logit_difference": differences}
    if options.gguf:
        written = _write_gguf(path, fidelity, options)
        text += f"\n{written}: llama-server -m {written} -c {_window(path)}"
        value["gguf"] = str(written)
    return text, value


def _write_gguf(export: Path, fidelity: dict[str, Any], options: argparse.Namespace) -> Path:
    """The export as a GGUF; what is folded into its weights is not multiplied once more."""
    import torch

    from ..export import convert

    return convert(
        export,
        Path(options.gguf),
        converter=Path(options.converter) if options.converter else None,
        inv_freq=torch.tensor(fidelity["inv_freq"]),
        multiplier=fidelity["attention_factor"] / math.sqrt(fidelity.get("fold", {}).get("gain", 1.0)),
        outtype=options.outtype,
    )


def verify_command(options: argparse.Namespace) -> Result:
    """What each stack will serve; exit code 3 on a mismatch."""
    from ..serving import TOLERANCE, ask_vllm, verify

    made = verify(options.checkpoint, options.stacks.split(",") if options.stacks else None)
    text, passed, value = made.text(), made.passed, asdict(made) | {"passed": made.passed}
    if options.engine:
        found = ask_vllm(options.checkpoint, options.engine_python)
        passed = passed and found.worst <= TOLERANCE
        lengths = ", ".join(f"{d:.1e} at {n} tokens" for n, d in found.differences.items())
        text += f"\n\nvLLM itself (window {found.max_model_len}), log-probabilities against transformers: {lengths}"
        value |= {"passed": passed, "vllm": asdict(found)}
    return text, value


def _window(path: Path) -> int:
    """What was asked for; max_position_embeddings may be a little more, to carry the learned numbers."""
    return int(json.loads((path / "fidelity.json").read_text(encoding="utf-8"))["window"])


def _serve_line(path: Path) -> str:
    return f"vllm serve {path} --max-model-len {_window(path)}"


def run_command(options: argparse.Namespace) -> Result:
    """Train, compare, export, verify and report."""
    from ..evaluation import as_json, compare, named_rows, table, write_report
    from ..tunable import Start

    tuning = _open(options)
    run = tuning.run
    if is_main_process():
        print(tuning.plan().text(), file=sys.stderr)
    tuning.train()
    if not is_main_process():
        return "", {}
    tuned, _ = named_rows(run, [])
    comparison = compare(run, tuned)
    path = tuning.export()
    checked = tuning.verify()
    report = write_report(run, comparison, next(iter(tuned.values())), Start.of(run.base.facts, run.recipe.rope))
    text = (
        f"{comparison.verdict()}\n\n{table(comparison)}\n\n{comparison.by_excerpt()}\n\nreport   {report}\npicture  "
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


def recipes_command(options: argparse.Namespace) -> Result:
    """List the recipes that come with the package, or copy one here with its files."""
    from ..recipe import copy_recipe, shipped_recipes

    if options.copy is None:
        found = shipped_recipes()
        lines = [f"{name:<26} {line}" for name, line in found.items()]
        return "\n".join([*lines, "", "Here, with its files: yarn-tune recipes --copy NAME"]), {"recipes": found}
    written = [str(path) for path in copy_recipe(options.copy, Path())]
    return "\n".join([*written, f"next: yarn-tune plan {written[0]}"]), {"written": written}


def push_command(options: argparse.Namespace) -> Result:
    """Say what would be uploaded; upload it if told to."""
    from ..export import prepare_upload, upload

    made = prepare_upload(Path(options.source), options.repo, options.base, options.adapter)
    value = {"repo": made.repo, "what": made.what, "files": made.sizes(), "commit": None}
    if not options.upload:
        return f"{made.text()}\nNothing was uploaded; --upload does it.", value
    address = upload(made, options.private, options.message)
    return f"{made.text()}\n{address}", value | {"commit": address}


def is_main_process() -> bool:
    """Whether this process prints; true outside `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"
