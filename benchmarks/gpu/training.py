"""The parts that train and compare: the demo, SmolLM2 at three windows, seeds, LoRA, and launchers."""

import importlib.util
import platform
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from yarn_tune import Tuning
from yarn_tune.evaluation import CompareRow, Comparison
from yarn_tune.runs import read_metrics

from .context import ROOT, Context, PartSkipped, Results, call, in_time, yarn_tune

DEMO = "recipes/tiny-demo.yaml"
TOLERANCE = 0.003
"""Largest difference of a mean NLL between the demo on a GPU and on a CPU."""
NATIVE = 8192
"""Native window of SmolLM2, in tokens."""


def environment(context: Context, results: Results) -> dict[str, Any]:
    """The GPU and the versions of the packages."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "smoke": context.smoke}
    for package in ("transformers", "accelerate", "peft", "safetensors", "deepspeed", "datasets"):
        found[package] = metadata.version(package) if importlib.util.find_spec(package) else None
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "memory_gib": round(card.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    else:
        found["card"] = "none (CPU)"
    return found


def demo(context: Context, results: Results) -> dict[str, Any]:
    """The demo recipe; each method beside the table measured on a CPU."""
    words = ["train.steps=2", "train.batch_size=2", "rope.window=512", "eval.documents=1", "eval.retrieval=null"]
    run = trained(context, "demo", DEMO, words if context.smoke else [])
    published = Comparison.load(ROOT / "benchmarks/results/tiny-demo-compare.json")
    reference = {row.method: row.longest for row in published.rows}
    table = {}
    for row in compared(context, run).rows:
        cpu = reference.get(row.method)
        table[row.method] = {"gpu": round(row.longest, 4), "cpu": cpu and round(cpu, 4)}
    pairs = [(one["gpu"], one["cpu"]) for one in table.values() if one["cpu"] is not None]
    worst = max(abs(gpu - cpu) for gpu, cpu in pairs)
    found: dict[str, Any] = {"nll": table, "seconds_per_step": seconds_per_step(run)}
    if not context.smoke:  # a smoke run reads other lengths
        found |= {"largest_difference": round(worst, 4), "within_tolerance": worst <= TOLERANCE}
    return found


def window_4x(context: Context, results: Results) -> dict[str, Any]:
    """SmolLM2 from 8192 to 32768 tokens by the recipe that `init` proposes, with retrieval."""
    return extended(context, 4, steps=60)


def windows_2x_and_8x(context: Context, results: Results) -> dict[str, Any]:
    """SmolLM2 to 16384 and 65536 tokens as in `window_4x`, with fewer steps."""
    found = {"2x": extended(context, 2, steps=40)}
    if context.left > 90 and not context.smoke:
        found["8x"] = extended(context, 8, steps=16)
    return found


def extended(context: Context, factor: int, steps: int) -> dict[str, Any]:
    """Propose a recipe for a window, train it, and compare on text like and unlike the training text."""
    native = 256 if context.smoke else NATIVE
    window = factor * native
    recipe = context.out / f"window-{factor}x.yaml"
    if not recipe.exists():
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 16
        yarn_tune(
            context, "init", str(context.model), "--window", str(window), "--train", documents(context, "train"),
            "--heldout", documents(context, "heldout"), "--gpu-memory", f"{gib:.0f}", "--out", str(recipe),
        )  # fmt: skip
    words = [f"train.steps={2 if context.smoke else steps}", "train.batch_size=2", *settings(context, native, window)]
    words.append(f"data.heldout_unlike=[{documents(context, 'unlike')}]")
    run = trained(context, f"window-{factor}x", str(recipe), words)
    comparison = compared(context, run)
    assert comparison.unlike is not None
    return {
        "window": window, "tokens": sum(line["tokens"] for line in read_metrics(run)),
        "seconds_per_step": seconds_per_step(run),
        "like": summary(comparison.rows), "unlike": summary(comparison.unlike.rows),
        "by_position": {row.method: row.by_position for row in comparison.rows}, "edges": comparison.edges,
    }  # fmt: skip


def seeds_and_lora(context: Context, results: Results) -> dict[str, Any]:
    """Three seeds of the run at 4x, and LoRA of rank 8 with the same tokens."""
    recipe = context.out / "window-4x.yaml"
    if not recipe.exists():
        raise PartSkipped("the part `smollm2 at 4x` did not leave its recipe")
    native = 256 if context.smoke else NATIVE
    common = [f"train.steps={2 if context.smoke else 30}", "train.batch_size=2", *settings(context, native, 4 * native)]
    ways = {f"seed {seed}": [f"train.seed={seed}"] for seed in ((0,) if context.smoke else (0, 1, 2))}
    ways["LoRA of rank 8"] = ["rope.frequencies=fixed", "rope.query_gains=none", "lora.rank=8"]
    found: dict[str, Any] = {}
    for name, words in ways.items():
        if context.left < 30:
            break
        run = trained(context, name.replace(" ", "-").lower(), str(recipe), [*common, *words])
        comparison = compared(context, run, "eval.retrieval=null")
        found[name] = {method: round(comparison.row(method).longest, 4) for method in ("yarn", "tuned")}
    tuned = [one["tuned"] for name, one in found.items() if name.startswith("seed")]
    spread = statistics.pstdev(tuned) if len(tuned) > 1 else None
    return {"nll": found, "spread_of_seeds": spread and round(spread, 4)}


def launched(context: Context, results: Results) -> dict[str, Any]:
    """One process through `accelerate launch`: plain, ZeRO-3 with CPU offload, FSDP2; the same learned numbers."""
    ways: dict[str, list[str]] = {"plain": [], "fsdp2": ["runtime.fsdp=true"]}
    skipped = {}
    if importlib.util.find_spec("deepspeed"):
        ways["zero-3, offloaded"] = ["runtime.zero=3", "runtime.offload=cpu"]
    else:
        skipped["zero-3, offloaded"] = "deepspeed is not installed"
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision",
                "no", "--dynamo_backend", "no", *([] if torch.cuda.is_available() else ["--cpu"])]  # fmt: skip
    words = ["train.steps=2", "train.batch_size=2", "rope.window=512"]
    losses: dict[str, list[float]] = {}
    for name, more in ways.items():
        folder = context.out / "runs" / f"launch-{name[:5]}"
        script = str(Path(__file__).with_name("train_in.py"))
        call(context, [sys.executable, *launcher, script, str(folder), DEMO, *words, *more], f"launching {name}")
        losses[name] = [line["loss"] for line in read_metrics(folder)]
    worst = max(abs(a - b) for each in losses.values() for a, b in zip(each, losses["plain"], strict=True))
    return {"losses": losses, "largest_difference": worst, "skipped": skipped or None}


def trained(context: Context, name: str, recipe: str, words: list[str]) -> Path:
    """Train in a folder below the results, or continue there; returns the run folder."""
    folder = context.out / "runs" / name
    folder.parent.mkdir(exist_ok=True)
    in_time(context, lambda: Tuning(recipe, [f"name={name}", *words], folder).train())
    return folder


def compared(context: Context, run: Path, *words: str) -> Comparison:
    """The comparison of a run."""
    yarn_tune(context, "compare", str(run), *words)
    return Comparison.load(run / "compare.json")


def summary(rows: list[CompareRow]) -> dict[str, Any]:
    """Mean, short texts, needles and excerpts of each method."""
    return {
        row.method: {
            "nll": round(row.longest, 4), "short": round(row.short_nll, 4),
            "needles": row.retrieved and round(row.retrieved[0], 3),
            "by_excerpt": [round(value, 4) for value in row.by_excerpt],
        }
        for row in rows
    }  # fmt: skip


def documents(context: Context, which: str) -> str:
    """A document file: of the demo in a smoke run, else of the public-domain documents."""
    if context.smoke:
        return str(ROOT / f"data/sample/{which}.jsonl.gz")
    names = {"train": "train", "heldout": "heldout-like", "unlike": "heldout-unlike"}
    path = context.documents / f"{names[which]}.jsonl.gz"
    if not path.exists():
        raise PartSkipped(f"{path} is missing: python data/public-domain/prepare.py makes it")
    return str(path)


def settings(context: Context, native: int, window: int) -> list[str]:
    """Settings of the comparison: few excerpts, and retrieval from half the native window to the window."""
    if context.smoke:
        return ["eval.documents=1", "eval.retrieval=null", "data.needles=0"]
    lengths = [n for n in (native // 2, native, 2 * native, 4 * native) if n <= window]
    grid = ", ".join(str(n - 32) for n in lengths)
    return ["eval.documents=4", f"eval.retrieval={{lengths: [{grid}], per_cell: 2}}"]


def seconds_per_step(run: Path) -> float:
    """Median over the steps after the first."""
    seconds = [line["seconds"] for line in read_metrics(run)]
    return round(statistics.median(seconds[1:] or seconds), 3)
