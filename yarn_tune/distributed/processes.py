"""Processes, devices and logs: the `accelerate` set-up, made from the recipe alone.

Precision: frozen weights and activations have the recipe's `base.dtype` because they are loaded in it; learned
numbers are float32. No autocast and no mixed-precision wrapper stands between, so there is one source of truth.

Every process holds all learned numbers and reads its share of a step's rows; gradients are sums over all processes,
taken here and nowhere else. What shards the frozen weights (`sharding.py`) never sees the numbers, so it cannot cast,
clip, rescale or lose them.
"""

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object, set_seed
from torch import Tensor, nn

from ..errors import CheckFailed, Interrupted, UserError
from ..recipe import Recipe

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "safetensors", "yarn_tune")

FOREIGN = {
    "ACCELERATE_USE_DEEPSPEED": "runtime.zero",
    "ACCELERATE_USE_FSDP": "runtime.fsdp",
    "ACCELERATE_USE_MEGATRON_LM": "runtime.zero",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "runtime.sequence",
}
"""Switches of `accelerate launch` and its config file -> the recipe's key for the same."""


@dataclass(frozen=True)
class World:
    """The processes of a run, in groups of `sequence` that share each row."""

    accelerator: Accelerator
    sequence: int = 1

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return self.accelerator.device  # type: ignore[no-any-return]

    @property
    def processes(self) -> int:
        """How many there are."""
        return int(self.accelerator.num_processes)

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return bool(self.accelerator.is_main_process)

    @property
    def group(self) -> int:
        """Which group this process is in: the group's rows are every `groups`-th of a step."""
        return int(self.accelerator.process_index) // self.sequence

    @property
    def groups(self) -> int:
        """How many groups share a step's rows."""
        return self.processes // self.sequence

    @property
    def part(self) -> int:
        """Which part of its group's rows this process reads."""
        return int(self.accelerator.process_index) % self.sequence

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(values, reduction="sum")  # type: ignore[no-any-return]

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace gradients by their sums over all processes, in one exchange."""
        if self.processes == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        summed = self.total(torch.cat([gradient.flatten() for gradient in gradients]))
        for parameter, part in zip(parameters, summed.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def check_agreement(self, facts: dict[str, object]) -> None:
        """Every process must start from the same facts, and read other rows than the other groups.

        Raises:
            CheckFailed: naming what differs.
        """
        found = gather_object([(self.group, self.part, facts)])
        for name in facts:
            if any(others[name] != found[0][2][name] for _, _, others in found):
                raise CheckFailed(f"start: the processes do not have the same {name}; is the code the same everywhere?")
        if len({(group, part) for group, part, _ in found}) < self.processes:
            raise CheckFailed("start: two processes would read the same rows; is each launched with its own RANK?")


def start(recipe: Recipe, folder: Path) -> World:
    """Set up processes, seeds and trackers.

    Raises:
        UserError: if fewer or more processes run than were asked for, or the launcher wants what the recipe says.
    """
    if recipe.runtime.threads:
        torch.set_num_threads(recipe.runtime.threads)
    if "wandb" in recipe.runtime.trackers and not os.environ.get("WANDB_API_KEY"):
        os.environ.setdefault("WANDB_MODE", "offline")
    for variable, key in FOREIGN.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise UserError(
                f"{variable} is set: the launcher's config would set up what {key} says in the recipe; launch with "
                "recipes/accelerate/gpus.yaml, or ./launch.sh"
            )
    # Without `cpu=True`, accelerate on a machine with no accelerator lets every process train alone.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",
        log_with=list(recipe.runtime.trackers) or None,
        project_dir=str(folder),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=recipe.runtime.timeout_minutes))],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    world, sequence = accelerator.num_processes, recipe.runtime.sequence
    if world != launched:
        raise UserError(f"{launched} processes were launched but {world} found each other; use ./launch.sh")
    if recipe.runtime.processes not in (None, world):
        raise UserError(f"runtime.processes: the recipe asks for {recipe.runtime.processes}, {world} are running")
    if world % sequence:
        raise UserError(f"runtime.sequence: {sequence} processes a row do not divide the {world} that are running")
    groups = world // sequence
    if recipe.train.batch_size % (groups * recipe.train.micro_batch_size):
        raise UserError(
            f"train.batch_size: {recipe.train.batch_size} rows cannot be shared by {groups} "
            f"{'processes' if sequence == 1 else 'groups of processes'} in micro-batches of "
            f"{recipe.train.micro_batch_size}"
        )
    set_seed(recipe.train.seed)
    return World(accelerator, sequence)


@contextmanager
def report_lost_peers(world: World, folder: Path) -> Iterator[None]:
    """What torch raises when the other processes are gone, or late, becomes a message.

    Raises:
        CheckFailed: naming the folder that holds what was saved.
    """
    try:
        yield
    except (CheckFailed, Interrupted):
        raise
    except RuntimeError as error:
        if world.processes == 1 or not re.search("gloo|NCCL|connection|timed? ?out|broken pipe", str(error), re.I):
            raise
        reason = str(error).strip().split("\n")[0]
        raise CheckFailed(
            f"another process of this run died, or took longer than runtime.timeout_minutes ({reason}); what was saved "
            f"in {folder / 'checkpoints'} is kept, and the same command continues from there"
        ) from error


def environment(world: World) -> dict[str, Any]:
    """What a reader needs to repeat the run: versions, commit, device, processes."""
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": _commit(),
        "device": str(world.device),
        "processes": world.processes,
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """Of this code, where it is a checkout and git is installed."""
    asked = ["git", "rev-parse", "HEAD"]
    try:
        said = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    return said.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # DeepSpeed is for Linux alone
        return None
