"""Processes, devices and trackers: the `accelerate` set-up, built from the recipe's `runtime` section.

Precision: the frozen weights are loaded in `base.dtype` and computed with in it; the learned parameters are float32.
There is no autocast and no mixed-precision wrapper.

Every process holds all learned parameters and reads its share of the rows of a step. Gradients are summed over all
processes here and nowhere else. The sharding of the frozen weights (`sharding.py`) does not touch the learned
parameters, so it cannot cast, clip or rescale them.
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
from ..recipe import Runtime

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "safetensors", "yarn_tune")

FOREIGN = {
    "ACCELERATE_USE_DEEPSPEED": "runtime.zero",
    "ACCELERATE_USE_FSDP": "runtime.fsdp",
    "ACCELERATE_USE_MEGATRON_LM": "runtime.zero",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "runtime.sequence",
}
"""Environment variables set by `accelerate launch` from its config file -> the recipe key for the same setting."""


@dataclass(frozen=True)
class World:
    """The processes of a run, in groups of `sequence` processes that share each row."""

    accelerator: Accelerator
    sequence: int = 1

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.accelerator.device  # type: ignore[no-any-return]

    @property
    def processes(self) -> int:
        """The number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return bool(self.accelerator.is_main_process)

    @property
    def group(self) -> int:
        """Index of this process's group, which reads every `groups`-th row of a step."""
        return int(self.accelerator.process_index) // self.sequence

    @property
    def groups(self) -> int:
        """The number of groups that share the rows of a step."""
        return self.processes // self.sequence

    @property
    def part(self) -> int:
        """Index of the part of each row that this process reads."""
        return int(self.accelerator.process_index) % self.sequence

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(values, reduction="sum")  # type: ignore[no-any-return]

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace the gradients by their sums over all processes, in one all-reduce."""
        if self.processes == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        summed = self.total(torch.cat([gradient.flatten() for gradient in gradients]))
        for parameter, part in zip(parameters, summed.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def check_agreement(self, facts: dict[str, object]) -> None:
        """Check that all processes start from the same values and that no two read the same part of the same rows.

        Args:
            facts: name -> value; values are compared between processes.

        Raises:
            CheckFailed: naming the value that differs.
        """
        found = gather_object([(self.group, self.part, facts)])
        for name in facts:
            if any(others[name] != found[0][2][name] for _, _, others in found):
                raise CheckFailed(f"start: the processes do not have the same {name}; is the code the same everywhere?")
        if len({(group, part) for group, part, _ in found}) < self.processes:
            raise CheckFailed("start: two processes would read the same rows; is each launched with its own RANK?")


def start(runtime: Runtime, seed: int, batch_size: int, micro_batch_size: int, folder: Path) -> World:
    """Set up the process group, the random seed and the trackers.

    Args:
        runtime: section of the recipe.
        seed: seed of all random number generators.
        batch_size: rows per step, over all processes.
        micro_batch_size: rows per forward pass.
        folder: the run folder, in which trackers write.

    Raises:
        UserError: if the number of processes is not the one the recipe names or cannot share the batch, or if the
            launcher's own config sets what the recipe's `runtime` section sets.
    """
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    if "wandb" in runtime.trackers and not os.environ.get("WANDB_API_KEY"):
        os.environ.setdefault("WANDB_MODE", "offline")
    for variable, key in FOREIGN.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise UserError(
                f"{variable} is set: the config of `accelerate launch` conflicts with {key} of the recipe; launch "
                "with recipes/accelerate/gpus.yaml, or with ./launch.sh"
            )
    # Without `cpu=True` and without an accelerator, accelerate starts no process group, and every process trains alone.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",
        log_with=list(runtime.trackers) or None,
        project_dir=str(folder),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=runtime.timeout_minutes))],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    world, sequence = accelerator.num_processes, runtime.sequence
    if world != launched:
        raise UserError(f"{launched} processes were launched but {world} are connected; launch with ./launch.sh")
    if runtime.processes not in (None, world):
        raise UserError(
            f"runtime.processes: the recipe is for {runtime.processes} processes, but {world} are running; launch "
            "that many, or set it to null"
        )
    if world % sequence:
        raise UserError(
            f"runtime.sequence: {world} processes cannot be divided into groups of {sequence}; launch a multiple of it"
        )
    groups = world // sequence
    if batch_size % (groups * micro_batch_size):
        raise UserError(
            f"train.batch_size: {batch_size} rows cannot be shared by {groups} "
            f"{'processes' if sequence == 1 else 'groups of processes'} in micro-batches of {micro_batch_size}; make "
            f"it a multiple of {groups * micro_batch_size}"
        )
    set_seed(seed)
    return World(accelerator, sequence)


@contextmanager
def report_lost_peers(world: World, folder: Path) -> Iterator[None]:
    """Replace the error that torch raises when other processes died or timed out by a message.

    Raises:
        CheckFailed: naming the folder with the saved checkpoints.
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
            f"another process of this run died, or took longer than runtime.timeout_minutes ({reason}); the "
            f"checkpoints in {folder / 'checkpoints'} are kept, and the same command continues from the last one"
        ) from error


def environment(world: World) -> dict[str, Any]:
    """Versions, commit, device, processes and threads, to repeat the run with."""
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": _commit(),
        "device": str(world.device),
        "processes": world.processes,
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The git commit of this code; None if it is no checkout or git is not installed."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        printed = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    return printed.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # DeepSpeed is installed on Linux only
        return None
