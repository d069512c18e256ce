"""What the parts share: paths, the time budget, results so far, and calls of the command line."""

import contextlib
import io
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from yarn_tune.cli import main

T = TypeVar("T")

ROOT = Path(__file__).parents[2]


class PartSkipped(Exception):
    """Raised by a part that this machine or the time left does not allow; the message is the reason."""


@dataclass(frozen=True)
class Context:
    """The paths that a part reads and writes, and its deadline."""

    out: Path
    deadline: float
    """End of the time budget, in seconds of `time.monotonic`."""
    base: Path
    documents: Path
    smoke: bool

    @property
    def model(self) -> Path:
        """The checkpoint that the parts use: the base, or the demo's in a smoke run."""
        return ROOT / "data/tiny-base" if self.smoke else self.base

    @property
    def left(self) -> float:
        """Seconds left; an hour in a smoke run."""
        return 3600.0 if self.smoke else self.deadline - time.monotonic()


@dataclass
class Results:
    """JSON of each part by name."""

    parts: dict[str, dict[str, Any]] = field(default_factory=dict)


def yarn_tune(context: Context, *words: str) -> None:
    """Run a command of yarn-tune in this process, which saves another import of torch.

    Raises:
        RuntimeError: if it fails, or outlasts the time left.
    """
    code = in_time(context, lambda: main([*words, "--json"]))
    if code not in (0, 3):
        raise RuntimeError(f"yarn-tune {' '.join(words[:2])} ended with exit code {code}")


def in_time(context: Context, work: Callable[[], T]) -> T:
    """Call `work`, and stop it when the time is up."""

    def stop(number: int, frame: object) -> None:
        raise RuntimeError("the time was up")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, context.left))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def call(context: Context, command: list[str], what: str) -> str:
    """Run a command in the checkout; returns its stdout.

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
