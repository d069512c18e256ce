"""What each command does: call one function, say the result in words and as an object.

Imports are inside the functions, so that `yarn-tune --help` and a mistyped recipe need no torch.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .sections import Recipe
    from .train import Run

Result = tuple[str, dict[str, Any]]
"""What a command prints: text for people, and the object for `--json`. A false `passed` in it is exit code 3."""


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


def init_command(options: argparse.Namespace) -> Result:
    """Write a first recipe."""
    from .checkpoint import write_atomically
    from .init import propose

    made = propose(options.model, options.window, options.train, options.heldout, options.gpu_memory, options.revision)
    path = Path(options.out or f"{made.recipe.name}.yaml")
    if path.exists():
        raise UserError(f"{path} is there already; name another file with --out")
    write_atomically(path, made.text.encode())
    text = f"{made.text}\nwritten to {path}; next: yarn-tune plan {path}"
    return text, {"path": str(path), "recipe": made.recipe.to_dict(), "cost": asdict(made.cost)}


def plan_command(options: argparse.Namespace) -> Result:
    """What a run will read, cover and cost."""
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


def train_command(options: argparse.Namespace) -> Result:
    """Learn."""
    from .evolve import learn

    run = _open(options)
    learned = learn(run)
    values = "\n".join(f"  {name} {value:.6g}" for name, value in learned.summary().items())
    return f"learned, in {run.folder}:\n{values}", {"run": str(run.folder), "learned": learned.as_json()}


def compare_command(options: argparse.Namespace) -> Result:
    """Measure every method."""
    from .compare import compare, named_rows
    from .results import as_json, table
    from .sweep import sweep, sweep_table

    options.overrides = [word for word in options.others if "=" in word]
    others = [Path(word) for word in options.others if "=" not in word]
    factors = _numbers("--factors", options.factors, float) if options.factors else []
    run = _open(options)
    tuned, checkpoints = named_rows(run, others)
    comparison = compare(run, tuned, checkpoints)
    text = f"{comparison.verdict()}\n\n{table(comparison)}"
    value: dict[str, Any] = {"verdict": comparison.verdict(), "rows": as_json(comparison)}
    if factors:
        cells = sweep(run, factors)
        text += f"\n\n{sweep_table(cells)}"
        value["factors"] = [asdict(cell) | {"rise": cell.rise} for cell in cells]
    return text, value


def _numbers(place: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """A list of numbers from the command line."""
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{place}: numbers with commas between them, as in 2,4,8; found {text!r}") from None


def export_command(options: argparse.Namespace) -> Result:
    """Write the checkpoint to serve."""
    from .adapter_files import adapter_recipe, is_adapter
    from .card import write_card
    from .export import export
    from .train import Run

    if options.stacks:
        options.overrides.append(f"export.stacks=[{options.stacks}]")
    if options.fold:
        options.overrides.append(f"export.fold={options.fold}")
    folder = Path(options.recipe)
    adapter = is_adapter(folder)
    run = Run(adapter_recipe(folder, options.overrides), folder) if adapter else _open(options)
    path = export(run, options.overrides_only)
    if options.overrides_only:
        overrides = json.loads(path.read_text(encoding="utf-8"))
        text = f"vllm serve {run.recipe.base.model} --hf-overrides '{json.dumps(overrides)}'"
        return text, {"path": str(path), "overrides": overrides}
    fidelity = json.loads((path / "fidelity.json").read_text(encoding="utf-8"))
    differences = fidelity["max_abs_logit_difference"]
    write_card(run, path)
    text = f"{path}: reloaded; largest logit difference {max(differences.values()):.1e}\n{_serve_line(path)}"
    value = {"path": str(path), "max_abs_logit_difference": differences}
    if options.gguf:
        written = _write_gguf(path, fidelity, options)
        text += f"\n{written}: llama-server -m {written} -c {_window(path)}"
        value["gguf"] = str(written)
    return text, value


def _write_gguf(export: Path, fidelity: dict[str, Any], options: argparse.Namespace) -> Path:
    """The export as a GGUF; what is folded into its weights is not multiplied once more."""
    import torch

    from .serving.gguf import convert

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


def _window(path: Path) -> int:
    """What was asked for; max_position_embeddings may be a little more, to carry the learned numbers."""
    return int(json.loads((path / "fidelity.json").read_text(encoding="utf-8"))["window"])


def _serve_line(path: Path) -> str:
    return f"vllm serve {path} --max-model-len {_window(path)}"


def run_command(options: argparse.Namespace) -> Result:
    """Train, compare, export, verify and report."""
    from .card import write_card
    from .compare import compare, named_rows
    from .evolve import learn
    from .export import export
    from .learned import Start
    from .plan import plan
    from .report import write_report
    from .results import as_json, table
    from .serving.verify import verify

    run = _open(options)
    if is_main_process():
        print(plan(run.recipe).text(), file=sys.stderr)
    learn(run)
    if not is_main_process():
        return "", {}
    tuned, _ = named_rows(run, [])
    comparison = compare(run, tuned)
    path = export(run)
    write_card(run, path)
    checked = verify(str(path), run.recipe.export.stacks)
    report = write_report(run, comparison, next(iter(tuned.values())), Start.of_recipe(run.recipe))
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


def _documents(options: argparse.Namespace, length: int) -> "Recipe":
    """A recipe that names the checkpoint and the documents of a command, for the functions that read one."""
    from .recipe import parse_recipe

    tree = {
        "name": "command",
        "base": {"model": options.checkpoint, "dtype": options.dtype},
        "rope": {"window": length},
        "data": {"train": ["none"], "heldout": options.documents},
    }
    return parse_recipe(tree, [], "command line")


def eval_command(options: argparse.Namespace) -> Result:
    """NLL of a checkpoint by position."""
    from .data import heldout_excerpts
    from .models import load_model, load_tokenizer, to_device
    from .perplexity import Nats, bucket_edges, by_position, full_nats, mean_over_windows, slid_nats

    recipe = _documents(options, options.length)
    excerpts = heldout_excerpts(recipe, load_tokenizer(options.checkpoint), options.length, options.count)
    model = to_device(load_model(options.checkpoint, dtype=options.dtype))
    window, stride = options.window or max(2, options.length // 4), options.stride or 256
    if options.protocol == "sliding":
        if not 2 <= window <= options.length or not 1 <= stride < window:
            raise UserError(f"--window, --stride: 2 <= window <= {options.length} and stride < window; "
                            f"found {window} and {stride}")  # fmt: skip
        documents = [slid_nats(model, ids, window, stride) for _, ids in excerpts]
    else:
        documents = [full_nats(model, ids, options.chunk) for _, ids in excerpts]
    edges = bucket_edges(options.length, recipe.eval.buckets)
    sums = [Nats(0.0, 0)] * recipe.eval.buckets
    for nats in documents:
        sums = [a + b for a, b in zip(sums, by_position(nats, edges), strict=True)]
    total = sum(sums, Nats(0.0, 0))
    mean = mean_over_windows(documents, window, stride) if options.unweighted else total.mean
    how = "mean over windows" if options.unweighted else f"over {total.count} tokens"
    lines = [f"{a:>8} to {b - 1:<8} {n.mean:.4f}" for a, b, n in zip(edges, edges[1:], sums, strict=False)]
    text = "\n".join([*lines, f"mean {mean:.4f} nats per token, PPL {math.exp(mean):.4f} ({options.protocol}, {how})"])
    value = {"edges": edges, "nll": [n.mean for n in sums], "mean": mean, "ppl": math.exp(mean), "tokens": total.count}
    return text, value


def retrieve_command(options: argparse.Namespace) -> Result:
    """Ask for numbers hidden in documents."""
    from functools import partial

    from .data import heldout_tokens
    from .models import load_model, load_tokenizer, to_device
    from .retrieval import WORDINGS, heat_map, retrieve, score_server, score_transformers, table

    lengths = _numbers("--lengths", options.lengths, int)
    depths = _numbers("--depths", options.depths, float)
    recipe = _documents(options, max(2, *lengths))
    tokenizer = load_tokenizer(options.checkpoint)
    filler = heldout_tokens(recipe, tokenizer)
    if options.engine == "vllm":
        score = partial(score_server, options.url, options.served_name or options.checkpoint)
    else:
        score = partial(score_transformers, to_device(load_model(options.checkpoint, dtype=options.dtype)))
    wording = WORDINGS[options.wording]
    found = retrieve(score, tokenizer, filler, lengths, depths, options.per_cell, options.keys, 0, wording)
    if options.picture:
        heat_map(found, Path(options.picture), f"Retrieval: {options.checkpoint}")
    share, low, high = found.accuracy()
    text = f"{table(found)}\n\nin all {share:.1%} (95% interval {low:.1%} to {high:.1%})"
    return text, {"accuracy": share, "interval": [low, high], "cells": found.as_json()}


def lm_eval_command(options: argparse.Namespace) -> Result:
    """Print the commands for lm-evaluation-harness."""
    from .models import config_json

    window = config_json(options.checkpoint)["max_position_embeddings"]
    metadata = json.dumps({"max_seq_lengths": [window]})
    common = f"--tasks {options.tasks} --metadata '{metadata}' --batch_size 1"
    path = options.checkpoint
    lines = [
        f"lm_eval --model hf --model_args pretrained={path},max_length={window},dtype=bfloat16 {common}",
        f"lm_eval --model vllm --model_args pretrained={path},max_model_len={window},dtype=bfloat16 {common}",
    ]
    return "\n".join(["pip install 'lm-eval[hf,ruler]'", *lines]), {"commands": lines}


def is_main_process() -> bool:
    """Whether this process prints; true outside `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"
