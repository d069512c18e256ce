"""Measure the seconds per step of a run over several processes of one thread, as a multiple of one process.

    python benchmarks/scaling.py [--processes 2] [--steps 8] [--out benchmarks/results]

The run is the bundled demo with two rows of 2048 tokens per step in float32. Two processes can at best halve the time;
a sharded model adds communication, through gloo here and NCCL on GPUs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SPREAD = {
    "one process": [],
    "whole weights": [],
    "zero: 3": ["runtime.zero=3"],
    "fsdp": ["runtime.fsdp=true"],
    "sequence: 2": ["runtime.sequence=2"],
}
PLAIN = [
    "base.dtype=float32",
    "train.short_context_kl=0",
    "train.objective=next-token",
    "runtime.threads=1",
    "train.micro_batch_size=1",
]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    rows = [f"train.batch_size={options.processes}", f"train.steps={options.steps}"]
    seconds = {}
    for name, settings in SPREAD.items():
        count = 1 if name == "one process" else options.processes
        seconds[name] = step_seconds(count, [*PLAIN, *rows, *settings])
        print(f"{name}: {seconds[name]:.2f} s", file=sys.stderr)
    one = seconds["one process"]
    found = [
        {"spread": name, "processes": 1 if name == "one process" else options.processes, "ratio": round(own / one, 3)}
        for name, own in seconds.items()
    ]
    (options.out / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(["| | a step |", "|---|---|", *(f"| {row['spread']} | {row['ratio']:.2f}x |" for row in found)]))


def step_seconds(processes: int, settings: list[str]) -> float:
    """Median seconds per step, without the first two steps."""
    root = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        recipe = [
            "name=scaling",
            f"base.model={root / 'data/tiny-base'}",
            f"data.train=[{root / 'data/sample/train.jsonl.gz'}]",
            f"data.heldout=[{root / 'data/sample/heldout.jsonl.gz'}]",
        ]
        subprocess.run(
            [*command, "-m", "yarn_tune", "train", str(root / "recipes/tiny-demo.yaml"), *recipe, *settings],
            cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True,
        )  # fmt: skip
        lines = (Path(folder) / "runs/scaling/metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["seconds"] for line in lines[2:])


if __name__ == "__main__":
    main()
