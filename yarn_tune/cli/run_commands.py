"""The commands of a run: call one function, return its result as text and as an object.

Packages are imported inside the functions, after the arguments are checked, so that a user error needs no import of
torch.
"""

import argparse
import json
import math
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    check_documents,
    check_model,
    check_revision,
    check_row,
    numbers_of,
    open_run,
    stacks_of,
    tell_other_revision,
)
from .result import CommandResult, in_launch, is_main_process
from .terminal import filled, plan_summary, summary, verdict_summary

if TYPE_CHECKING:
    from ..api import Tuning
    from ..export import Fidelity
    from ..runs import Run


def _open(options: argparse.Namespace, documents: bool = False) -> "Tuning":
    """The run that a command is about: a run folder, or `runs/<name>` of a recipe."""
    recipe, folder = open_run(options, documents)

    from ..api import Tuning

    return Tuning(recipe, folder=folder)


def _again(options: argparse.Namespace) -> str:
    """The recipe and the settings of a command, for the next one."""
    return shlex.join([options.recipe, *options.overrides])


def plan_command(options: argparse.Namespace) -> CommandResult:
    """Print what a run will read, cover and cost."""
    tuning = _open(options)
    made = tuning.plan()
    value = {
        "recipe": tuning.run.recipe.to_dict(),
        "learned_numbers": made.learned_numbers,
        "cost": asdict(made.cost) if made.cost else None,
        "gpu_hours": made.gpu_hours,
        "results": asdict(made.results) if made.results else None,
        "rows": len(made.rows.rows) if made.rows else None,
        "coverage": asdict(made.coverage) | {"untrained": made.coverage.untrained},
        "notes": made.notes,
    }
    return CommandResult(plan_summary(made.text()), value, f"yarn-tune train {_again(options)}")


def train_command(options: argparse.Namespace) -> CommandResult:
    """Train."""
    tuning = _open(options, documents=True)

    from ..runs import is_complete, read_decision

    complete = is_complete(tuning.run)
    run, learned = tuning.run, tuning.train()
    values = "\n".join(f"  {name} {value:.6g}" for name, value in learned.summary().items())
    value: dict[str, Any] = {"run": str(run.folder), "learned": learned.as_json(), "trained": not complete}
    text = f"learned, in {run.folder}:\n{values}"
    if complete:
        text = f"{run.folder} is complete: {run.recipe.train.steps} steps were trained before, and none now\n{text}"
    if is_main_process() and (decision := read_decision(run)) is not None:
        text += f"\n{decision.text()}"
        value["decision"] = decision.as_json()
    return CommandResult(text, value, f"yarn-tune compare {run.folder}")


def compare_command(options: argparse.Namespace) -> CommandResult:
    """Measure every method."""
    options.overrides = [word for word in options.others if "=" in word]
    others = [Path(word) for word in options.others if "=" not in word]
    for path in others:
        check_row(path)
    factors = numbers_of("--factors", options.factors, float) if options.factors else []
    recipe, folder = open_run(options)
    for place, names in recipe.data.heldout_files().items():
        check_documents(place, names, recipe.data.prepare)

    from ..api import Tuning
    from ..evaluation import check_factors, learn_native_adapted, sweep, sweep_table, tables
    from ..report import report_run

    tuning = Tuning(recipe, folder=folder)
    check_factors(tuning.run, factors)
    if in_launch():
        learn_native_adapted(tuning.run)  # in every process, before all but the main one return
    if not is_main_process():
        return CommandResult("", {})
    interrupted = _interrupted_text(tuning)
    if interrupted:
        print(f"yarn-tune: {interrupted}", file=sys.stderr)
    comparison = tuning.compare(others)
    report = report_run(tuning.run)
    text = f"{interrupted}\n\n" if interrupted else ""
    text += f"{verdict_summary(comparison.verdict())}\n\n{tables(comparison) if options.all else summary(comparison)}"
    value: dict[str, Any] = {
        "verdict": comparison.verdict().lines(),
        "comparison": asdict(comparison),
        "report": str(report),
    }
    if factors:
        cells = sweep(tuning.run, factors)
        text += f"\n\n{sweep_table(cells)}"
        value["factors"] = [asdict(cell) | {"rise": cell.rise} for cell in cells]
    text += f"\n\nreport   {report}"
    trained = tuning.run.numbers_path.is_file()
    return CommandResult(text, value, f"yarn-tune {'export' if trained else 'train'} {_again(options)}")


def _interrupted_text(tuning: "Tuning") -> str:
    """What a comparison of a run that was not trained to its end does without; empty for other runs."""
    from ..runs import latest_state

    run = tuning.run
    state = None if run.numbers_path.is_file() else latest_state(run.checkpoints)
    if state is None:
        return ""
    return (
        f"{run.folder} is interrupted after step {state.step} of {run.recipe.train.steps}, so the table has no row of "
        f"it; `yarn-tune train {run.folder}` trains the rest"
    )


def export_command(options: argparse.Namespace) -> CommandResult:
    """Write the checkpoint to serve."""
    if options.stacks:
        options.overrides.append(f"export.stacks=[{','.join(stacks_of(options.stacks))}]")
    if options.fold:
        options.overrides.append(f"export.fold={options.fold}")
    if options.revision:
        options.overrides.append(f"base.revision={json.dumps(options.revision)}")
    folder, out = Path(options.recipe), Path(options.out) if options.out else None
    adapter = (folder / "adapter_config.json").is_file()
    if not adapter:
        open_run(options)

    from ..adapter import read_sections
    from ..export import Fidelity, difference_text, export, export_overrides
    from ..runs import AdapterRun, recorded_base

    run: Run | AdapterRun
    if adapter:
        sections = read_sections(folder, options.overrides)
        check_model("base.model", sections.base.model, sections.base.prepare)
        run = AdapterRun(sections, folder)
    else:
        run = _open(options).run
    check_revision(run.sections.base.model, options.revision)
    tell_other_revision(run.folder, recorded_base(run), run.sections.base)
    if options.overrides_only:
        path = export_overrides(run, options.anyway, out)
        overrides = json.loads(path.read_text(encoding="utf-8"))
        text = (
            f"vllm serve {run.base.source.model} --hf-overrides '{json.dumps(overrides)}'\n"
            "WARNING: vLLM does not pass overrides to a speculative draft (MTP layers), which would run on the config "
            "of the base; the config.json of an exported checkpoint applies to the draft too"
        )
        return CommandResult(text, {"path": str(path), "overrides": overrides})
    path = export(run, options.anyway, out)
    fidelity = Fidelity.read(path)
    serve = serve_line(path, fidelity.window)
    text = filled(f"{path}: reloaded; largest logit difference {difference_text(fidelity)}") + "\n"
    text += f"{filled(fidelity.rounding_cost.text())}\n{serve}" if fidelity.rounding_cost else serve
    value = {"path": str(path), "max_abs_logit_difference": fidelity.max_abs_logit_difference}
    if options.gguf:
        written = _write_gguf(path, fidelity, options)
        text += f"\n{written}: llama-server -m {written} -c {fidelity.window}"
        value["gguf"] = str(written)
    return CommandResult(text, value, f"yarn-tune verify {path}")


def _write_gguf(export: Path, fidelity: "Fidelity", options: argparse.Namespace) -> Path:
    """Convert the export to a GGUF; the part of the multiplier that is folded into its weights is divided out."""
    import torch

    from ..export import convert

    return convert(
        export,
        Path(options.gguf),
        converter=Path(options.converter) if options.converter else None,
        inv_freq=torch.tensor(fidelity.inv_freq),
        multiplier=fidelity.attention_factor / math.sqrt(fidelity.folded_gain),
        outtype=options.outtype,
    )


def report_command(options: argparse.Namespace) -> CommandResult:
    """Write the report of a comparison anew."""
    tuning = _open(options)

    from ..report import report_run

    path = report_run(tuning.run)
    return CommandResult(str(path), {"report": str(path)})


def serve_line(path: Path, window: int) -> str:
    """The command that serves an export."""
    return f"vllm serve {path} --max-model-len {window}"


def run_command(options: argparse.Namespace) -> CommandResult:
    """Plan, train, compare, export, verify and report."""
    tuning = _open(options, documents=True)

    from ..evaluation import compare, learn_native_adapted, named_rows, tables
    from ..report import write_report
    from ..runs import read_decision

    run = tuning.run
    if is_main_process():
        print(plan_summary(tuning.plan().text()), file=sys.stderr)
    tuning.train()
    learn_native_adapted(run)  # in every process, before all but the main one return
    if not is_main_process():
        return CommandResult("", {})
    tuned, _ = named_rows(run, [])
    comparison = compare(run, tuned)
    decision = read_decision(run)
    if decision is not None and decision.keeps_start:
        shown = tables(comparison) if options.all else summary(comparison)
        value = {"decision": decision.as_json(), "comparison": asdict(comparison), "passed": False}
        return CommandResult(f"{shown}\n\n{decision.text()}", value, passed=False)
    path = tuning.export()
    checked = tuning.verify()
    report = write_report(run, comparison, next(iter(tuned.values())))
    text = (
        f"{verdict_summary(comparison.verdict())}\n\n{tables(comparison) if options.all else summary(comparison)}\n\n"
        f"report   {report}\npicture  {run.folder / 'nll_by_position.png'}\nexport   {path}\n"
        f"verified {', '.join(line.stack for line in checked.lines)}"
    )
    value = {
        "verdict": comparison.verdict().lines(),
        "comparison": asdict(comparison),
        "export": str(path),
        "passed": checked.passed,
        "report": str(report),
        "serve": serve_line(path, run.recipe.rope.window),
    }
    return CommandResult(text, value, serve_line(path, run.recipe.rope.window), checked.passed)
