"""Processes, devices and logs: the `accelerate` set-up, made from the recipe alone.

Precision: frozen weights and activations have the recipe's `base.dtype` because they are loaded in it; learned
numbers are float32. No autocast and no mixed-precision wrapper stands between, so there is one source of truth.
"""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from .errors import UserError
from .sections import Recipe

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors", "yarn_tune")


def start(recipe: Recipe, folder: Path) -> Accelerator:
    """Set up processes, seeds and trackers.

    Raises:
        UserError: if fewer or more processes run than were asked for.
    """
    if recipe.runtime.threads:
        torch.set_num_threads(recipe.runtime.threads)
    if "wandb" in recipe.runtime.trackers and not os.environ.get("WANDB_API_KEY"):
        os.environ.setdefault("WANDB_MODE", "offline")
    # Without `cpu=True`, accelerate on a machine with no accelerator lets every process train alone.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        log_with=list(recipe.runtime.trackers) or None,
        project_dir=str(folder),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    world = accelerator.num_processes
    if world != launched:
        raise UserError(f"{launched} processes were launched but {world} found each other; use ./launch.sh")
    if recipe.runtime.processes not in (None, world):
        raise UserError(f"runtime.processes: the recipe asks for {recipe.runtime.processes}, {world} are running")
    if recipe.train.batch_rows % (world * recipe.train.micro_rows):
        raise UserError(
            f"train.batch_rows: {recipe.train.batch_rows} rows cannot be shared by {world} processes in "
            f"micro-batches of {recipe.train.micro_rows}"
        )
    set_seed(recipe.train.seed)
    return accelerator


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What a reader needs to repeat the run: versions, commit, device, processes."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }
