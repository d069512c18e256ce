"""What the parts share: paths, the time budget, results so far, and calls of the command line."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class PartSkipped(Exception):
    """A part that this machine or the time left does not allow; the message says which."""


@dataclass(frozen=True)
class Context:
    """Where a part reads and writes, and until when."""

    out: Path
    deadline: float
    """In seconds of `time.monotonic`."""
    base: Path
    documents: Path
    smoke: bool

    @property
    def left(self) -> float:
        """Seconds left; without end in a smoke run."""
        return 3600.0 if self.smoke else self.deadline - time.monotonic()


@dataclass
class Results:
    """JSON of each part by name."""

    parts: dict[str, dict[str, Any]] = field(default_factory=dict)


def yarn_tune(context: Context, *words: str) -> dict[str, Any]:
    """Run a command of the command line; its `--json` output."""
    said = call(context, [sys.executable, "-m", "yarn_tune", *words, "--json"], f"yarn-tune {words[0]}")
    lines = [line for line in said.splitlines() if line.startswith(("{", "["))]
    value = json.loads(lines[-1]) if lines else {}
    return value if isinstance(value, dict) else {"value": value}


def call(context: Context, command: list[str], what: str) -> str:
    """Run a command from the checkout; its stdout.

    Raises:
        RuntimeError: with the end of its stderr, if it fails or outlasts the time left.
    """
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, context.left), check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{what} did not end within the time left") from None
    if done.returncode not in (0, 3):
        raise RuntimeError(f"{what} failed: {done.stderr.strip()[-800:]}")
    return done.stdout


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
