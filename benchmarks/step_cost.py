"""Measure the cost of a training step: time as a multiple of a forward pass, memory as a multiple of a prefill.

    python benchmarks/step_cost.py [--model data/tiny-base] [--tokens 2048 8192] [--out benchmarks/results]

Every cell runs in its own process, so that peaks are not mixed: peak resident memory above that of the loaded model (on
a GPU: allocated memory). A prefill is one forward pass without gradients that keeps keys and values, as for inference.
The learned numbers are a factor per pair, the temperature, and a gain and a phase per layer, head and pair.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache
from yarn_tune.distributed import checkpoint_layers
from yarn_tune.models import hidden_states, load_model, rope_facts, to_device
from yarn_tune.recipe import Rope
from yarn_tune.training import Objective, ObjectiveConfig
from yarn_tune.tunable import Start, adjustments_for, attach

WAYS = ("prefill", "forward", "backprop", "checkpointing", "attention kept")
REPEATS = 3


def main() -> None:
    """Measure every cell and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="data/tiny-base")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cell", nargs=2, metavar=("WAY", "TOKENS"), help="one cell, in this process")
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(cell(options.model, options.dtype, options.cell[0], int(options.cell[1]))))
        return
    found = []
    for tokens in options.tokens:
        for way in WAYS:
            command = [sys.executable, __file__, "--model", options.model, "--dtype", options.dtype, "--cell", way]
            done = subprocess.run([*command, str(tokens)], check=True, capture_output=True, text=True)
            found.append({"way": way, "tokens": tokens, **json.loads(done.stdout.splitlines()[-1])})
            print(found[-1], file=sys.stderr)
    (options.out / "step-cost.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def cell(model_name: str, dtype: str, way: str, tokens: int) -> dict[str, float]:
    """Median seconds and peak MiB of one way to run a step."""
    model = to_device(load_model(model_name, dtype=dtype))
    rope = Rope(window=tokens, query_gains="pair_phase")
    start = Start.of(rope_facts(model.config), rope)
    rotary = attach(model, start, "per_pair", adjustments_for(model.config.to_dict(), rope))
    if way in ("checkpointing", "attention kept"):
        checkpoint_layers(model, way == "attention kept")
        model.train()
    objective = Objective(model, rotary, ObjectiveConfig())
    ids = torch.randint(1, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    positions = torch.arange(tokens, device=model.device)[None]
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)

    def prefill() -> None:
        with torch.no_grad():
            hidden_states(model, ids, cache=DynamicCache(config=model.config))

    def forward() -> None:
        with torch.no_grad():
            objective(ids, positions, labels)

    def step() -> None:
        objective(ids, positions, labels)[0].backward()

    run: Callable[[], None] = {"prefill": prefill, "forward": forward}.get(way, step)
    base = memory()
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
    times = []
    for _ in range(REPEATS):
        started = time.monotonic()
        run()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.monotonic() - started)
    return {"seconds": round(statistics.median(times), 3), "mib": round(memory() - base, 1)}


def memory() -> float:
    """Peak memory so far, in MiB."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def table(found: list[dict[str, float]]) -> str:
    """A Markdown table: time in forward passes and memory in prefills, by tokens per row."""
    at = {(one["way"], one["tokens"]): one for one in found}
    tokens = sorted({int(one["tokens"]) for one in found})
    lines = ["| | " + " | ".join(f"{n} tokens: time, memory" for n in tokens) + " |", "|---" * (1 + len(tokens)) + "|"]
    for way in WAYS:
        cells = []
        for n in tokens:
            seconds = at[way, n]["seconds"] / at["forward", n]["seconds"]
            cells.append(f"{seconds:.2f}x, {at[way, n]['mib'] / at['prefill', n]['mib']:.2f}x")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
