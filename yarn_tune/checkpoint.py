"""A run's resumable state on disk: small, readable without yarn_tune, never half-written.

A checkpoint is a folder `step-000050/` with `state.safetensors` (learned offsets, optimizer moments) and
`state.json` (step, and the SHA-256 of the tensors). It is written under another name, flushed to disk, and then
renamed; one whose checksum does not hold is skipped in favour of the one before.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .errors import UserError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class State:
    """Everything a run continues from. Rows and rates are functions of `step`, so they need no state."""

    step: int
    """Steps done."""
    numbers: Tensors
    optimizer: Tensors


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`write_atomically`, for JSON a person can read."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def save_state(folder: Path, state: State, keep: int) -> None:
    """Write `state` under `folder` and delete all but the last `keep` checkpoints."""
    tensors = {f"numbers.{name}": tensor.contiguous() for name, tensor in state.numbers.items()}
    tensors |= {f"optimizer.{name}": tensor.contiguous() for name, tensor in state.optimizer.items()}
    content = save(tensors)
    target = folder / f"step-{state.step:06d}"
    partial = folder / f".{target.name}.partial"
    for stale in (partial, target):
        shutil.rmtree(stale, ignore_errors=True)
    write_atomically(partial / "state.safetensors", content)
    write_json(partial / "state.json", {"step": state.step, "sha256": hashlib.sha256(content).hexdigest()})
    partial.rename(target)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def latest_state(folder: Path) -> State | None:
    """The newest checkpoint that is whole, or None."""
    for target in sorted(folder.glob("step-*"), reverse=True):
        try:
            meta = json.loads((target / "state.json").read_text(encoding="utf-8"))
            content = (target / "state.safetensors").read_bytes()
        except (OSError, ValueError):
            continue
        if hashlib.sha256(content).hexdigest() == meta.get("sha256"):
            tensors = load(content)
            return State(meta["step"], _part(tensors, "numbers."), _part(tensors, "optimizer."))
    return None


def read_tensors(path: Path) -> Tensors:
    """A safetensors file of ours.

    Raises:
        UserError: if it is damaged or cut short.
    """
    try:
        return load(path.read_bytes())
    except (SafetensorError, OSError, ValueError, KeyError, OverflowError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} cannot be read ({reason}): delete it, and the same command makes it again") from error


def _part(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's moments and step counts, flat."""
    states = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value.detach().cpu().clone()
        for index, state in states.items()
        for name, value in state.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Put back what `optimizer_tensors` took."""
    states: dict[int, Tensors] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        states.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
