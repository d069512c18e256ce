"""What a run tells while it learns: `metrics.jsonl`, the progress bar's text, and the trackers.

The file is the record: it has each step once, whatever was killed and continued. Trackers are a convenience: one that
dies is dropped with a word, and the run goes on.
"""

import json
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..distributed import World, environment
from ..errors import UserError
from ..files import unwritable, write_atomically, write_json
from ..recipe import Recipe
from ..tunable import Learned
from .folder import Run

EARLIER = "earlier.json"
"""What was spent before, on the run that this one learns on from (`rope.init`)."""


class MetricsLog:
    """`metrics.jsonl` (one object a step) and the trackers."""

    def __init__(self, folder: Path, recipe: Recipe, world: World, done: int) -> None:
        self.world, self.path = world, folder / "metrics.jsonl"
        self.tracking = bool(recipe.runtime.trackers)
        if not world.main:
            return
        # Steps after the checkpoint will be done again, so their lines go, and with them one that was cut short.
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        write_atomically(self.path, "".join(f"{line}\n" for line in lines[:done] if line.endswith("}}")).encode())
        write_json(folder / "environment.json", environment(world))
        options = {"wandb": {"id": _wandb_id(folder), "resume": "allow"}} if "wandb" in recipe.runtime.trackers else {}
        config = _flat(recipe.to_dict())
        self._track(lambda: world.accelerator.init_trackers("yarn_tune", config=config, init_kwargs=options))

    def write(self, step: int, loss: float, norm: float, tokens: int, seconds: float, learned: Learned) -> None:
        """Log one step.

        Raises:
            UserError: if the file cannot be written.
        """
        if not self.world.main:
            return
        values = {"loss": loss, "gradient_norm": norm, "tokens": tokens, "seconds": round(seconds, 3)}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values, "learned": learned.summary()}) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint of the step, which would not do it again
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._track(lambda: self.world.accelerator.log({**values, **learned.summary()}, step=step))

    def _track(self, tell: Callable[[], None]) -> None:
        self.tracking = self.tracking and _survived(tell)


def spent(folder: Path, until: int | None = None) -> tuple[int, int, float]:
    """(steps, tokens read, seconds) of what was learned in a run folder, and before it where it learned on.

    Args:
        folder: of the run.
        until: steps to count; None: all.

    Raises:
        UserError: if the run's record is not there, or damaged.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:until]
        tokens, seconds = sum(line["tokens"] for line in lines), sum(line["seconds"] for line in lines)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: what was spent cannot be read from it ({error}); it came with the run") from error
    steps = len(lines)
    if (folder / EARLIER).is_file():
        before = json.loads((folder / EARLIER).read_text(encoding="utf-8"))
        steps, tokens, seconds = steps + before["steps"], tokens + before["tokens"], seconds + before["seconds"]
    return steps, tokens, round(seconds, 1)


def end_training(world: World) -> None:
    """Close the trackers, and part from the other processes."""
    world.accelerator.wait_for_everyone()
    _survived(world.accelerator.end_training)


def _survived(tell: Callable[[], None]) -> bool:
    """Whether the trackers took it; nothing that one does may end a run."""
    try:
        tell()
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        print(f"yarn-tune: a tracker failed ({reason}); the run goes on, see its metrics.jsonl", file=sys.stderr)
        return False
    return True


def progress_text(loss: float, learned: Learned, speed: float) -> str:
    """Loss, learned values and tokens per second, for the progress bar."""
    values = " ".join(f"{name} {value:.4g}" for name, value in learned.summary().items())
    return f"loss {loss:.4f} {values} {speed:.0f} tok/s"


def _wandb_id(folder: Path) -> str:
    """The id of the run there, the same after a resume."""
    path = folder / "trackers.json"
    if not path.is_file():
        write_json(path, {"wandb": uuid.uuid4().hex[:8]})
    found: str = json.loads(path.read_text(encoding="utf-8"))["wandb"]
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested values under dotted keys, as trackers want them."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return flat


def taught(run: Run) -> str:
    """By how much reading something was learned, or nothing where that is not known, as of an adapter."""
    if not (run.folder / "metrics.jsonl").is_file():
        return ""
    steps, tokens, _ = spent(run.folder)
    return f", in {steps} steps on {tokens:,} tokens"
