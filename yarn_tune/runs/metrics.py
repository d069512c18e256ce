"""What a run reports while it trains: `metrics.jsonl`, the text of the progress bar, and the trackers.

`metrics.jsonl` is the record: one line per step with a checksum, each step once, however often the run was killed and
continued. A tracker that fails is dropped with a message, and the run goes on.
"""

import json
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..distributed import World, environment
from ..files import (
    has_checksum,
    read_bytes,
    read_checked,
    unreadable,
    unwritable,
    with_checksum,
    write_atomically,
    write_checked,
    write_json,
)
from ..recipe import Recipe
from ..tunable import Learned
from .folder import AdapterRun, Run
from .progress import ProgressLine

EARLIER = "earlier.json"
"""Name of the file in a run folder with the costs of the run that it started from (`rope.init`)."""

SUMMARY = "learned.json"
"""Name of the file in a run folder with the learned values in natural units and the number of steps."""

LOST = (
    "it is the record of what the run cost. Copy it back from where the run was made, or train anew under another name="
)


class MetricsLog:
    """`metrics.jsonl` (one object per step) and the trackers."""

    def __init__(self, folder: Path, recipe: Recipe, world: World, done: int) -> None:
        """Open the record of a run after `done` steps, and start the trackers.

        Raises:
            UserError: if the record of these steps is not complete, or it cannot be written.
        """
        self.world, self.path = world, folder / "metrics.jsonl"
        self.tracking = bool(recipe.runtime.trackers)
        self.progress = ProgressLine(recipe.train.steps, done)
        if not world.main:
            return
        # The steps after the checkpoint are repeated, so their lines are dropped.
        records = read_metrics(folder, done) if done else []
        write_atomically(self.path, b"".join(map(metrics_line, records)))
        self.progress.first_loss = records[0]["loss"] if records else None
        write_json(folder / "environment.json", environment(world))
        options = {"wandb": {"id": _wandb_id(folder), "resume": "allow"}} if "wandb" in recipe.runtime.trackers else {}
        config = _flat(recipe.to_dict())
        self._track(lambda: world.accelerator.init_trackers("yarn_tune", config=config, init_kwargs=options))

    def write(self, step: int, loss: float, norm: float, tokens: int, seconds: float, learned: Learned) -> None:
        """Log one step and print the progress.

        Raises:
            UserError: if the file cannot be written.
        """
        if not self.world.main:
            return
        values = {"loss": loss, "gradient_norm": norm, "tokens": tokens, "seconds": round(seconds, 3)}
        try:
            with open(self.path, "ab") as file:
                file.write(metrics_line({"step": step, **values, "learned": learned.summary()}))
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint of this step is written
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._track(lambda: self.world.accelerator.log({**values, **learned.summary()}, step=step))
        self.progress.step(loss, tokens, seconds)

    def announce(self, number: int) -> None:
        """Print that a signal was received and how long the current step takes; called from a signal handler."""
        if self.world.main:
            self.progress.announce(number)

    def _track(self, call: Callable[[], None]) -> None:
        self.tracking = self.tracking and _survived(call)


def metrics_line(record: dict[str, Any]) -> bytes:
    """One line of `metrics.jsonl`, with its checksum."""
    return (json.dumps(with_checksum(json.loads(json.dumps(record)))) + "\n").encode()


def read_metrics(folder: Path, steps: int | None = None) -> list[dict[str, Any]]:
    """The records of steps 1 to `steps` (None: to the last) of a run, in order.

    Raises:
        UserError: if the file or a line is missing, damaged or out of order.
    """
    path, records = folder / "metrics.jsonl", list[dict[str, Any]]()
    try:
        for number, line in enumerate(read_bytes(path).splitlines()[:steps], 1):
            record = json.loads(line)
            if not has_checksum(record) or record["step"] != number:
                raise ValueError(f"line {number} is damaged or not of step {number}")
            records.append(record)
        if steps is not None and len(records) < steps:
            raise ValueError(f"{len(records)} of {steps} steps are in it")
        if steps is None and not records:
            raise ValueError("no step is in it")
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise unreadable(path, error, LOST) from error
    return records


def spent(folder: Path, until: int | None = None) -> tuple[int, int, float]:
    """(steps, tokens read, seconds) that a run took, including the runs it started from.

    Args:
        folder: the run folder.
        until: number of steps to count; None: all.

    Raises:
        UserError: if the record of the run is missing, damaged or not complete.
    """
    if until is None and (folder / SUMMARY).is_file():
        until = read_checked(folder / SUMMARY, LOST)["steps"]
    records = read_metrics(folder, until)
    tokens, seconds = sum(record["tokens"] for record in records), sum(record["seconds"] for record in records)
    steps = len(records)
    if (folder / EARLIER).is_file():
        before = read_checked(folder / EARLIER, LOST)
        steps, tokens, seconds = steps + before["steps"], tokens + before["tokens"], seconds + before["seconds"]
    return steps, tokens, round(seconds, 1)


def end_training(world: World) -> None:
    """Wait for the other processes and close the trackers."""
    world.accelerator.wait_for_everyone()
    _survived(world.accelerator.end_training)


def _survived(call: Callable[[], None]) -> bool:
    """Whether a call to the trackers succeeded; none of their errors ends a run."""
    try:
        call()
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        print(f"yarn-tune: a tracker failed ({reason}); the run goes on, see its metrics.jsonl", file=sys.stderr)
        return False
    return True


def _wandb_id(folder: Path) -> str:
    """The id of the run on wandb, the same after a resume."""
    path = folder / "trackers.json"
    if not path.is_file():
        write_checked(path, {"wandb": uuid.uuid4().hex[:8]})
    found: str = read_checked(path, "delete it, and the run gets a new id")["wandb"]
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested values under dotted keys, as trackers take them."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return flat


def training_costs(run: Run | AdapterRun) -> str:
    """The phrase ", in N steps on N tokens"; empty if the costs are not known, as for an adapter."""
    if not (run.folder / "metrics.jsonl").is_file() and not (run.folder / SUMMARY).is_file():
        return ""
    steps, tokens, _ = spent(run.folder)
    return f", in {steps} steps on {tokens:,} tokens"
