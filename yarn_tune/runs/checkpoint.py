"""A run's resumable state on disk: small, readable without yarn_tune, never half-written.

A checkpoint is a folder `step-000050/` with `state.safetensors` (learned offsets, optimizer moments) and
`state.json` (step, and the SHA-256 of the tensors). It is written under another name, flushed to disk, and then
renamed; one whose checksum does not hold is skipped in favour of the one before. An export gets its name the same way.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..files import Tensors, put_in_place, write_atomically, write_json

LEARNED = "learned.safetensors"
"""What a finished run has learned: its offsets, in the run folder."""


@dataclass(frozen=True)
class State:
    """Everything a run continues from. Rows and rates are functions of `step`, so they need no state."""

    step: int
    """Steps done."""
    numbers: Tensors
    optimizer: Tensors


def save_state(folder: Path, state: State, keep: int) -> None:
    """Write `state` under `folder` and delete all but the last `keep` checkpoints."""
    tensors = {f"numbers.{name}": tensor.contiguous() for name, tensor in state.numbers.items()}
    tensors |= {f"optimizer.{name}": tensor.contiguous() for name, tensor in state.optimizer.items()}
    content = save(tensors)
    target = folder / f"step-{state.step:06d}"
    partial = folder / f".{target.name}.partial"
    for stale in folder.glob(".*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        write_atomically(partial / "state.safetensors", content)
        write_json(partial / "state.json", {"step": state.step, "sha256": hashlib.sha256(content).hexdigest()})
        put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def latest_state(folder: Path) -> State | None:
    """The newest checkpoint that is whole, or None."""
    found = (read_state(target) for target in sorted(folder.glob("step-*"), reverse=True))
    return next((state for state in found if state is not None), None)


def read_state(target: Path) -> State | None:
    """The checkpoint in this very folder if it is whole, or None."""
    try:
        meta = json.loads((target / "state.json").read_text(encoding="utf-8"))
        content = (target / "state.safetensors").read_bytes()
        if hashlib.sha256(content).hexdigest() != meta["sha256"]:
            return None
        tensors = load(content)
        return State(int(meta["step"]), _part(tensors, "numbers."), _part(tensors, "optimizer."))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


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
