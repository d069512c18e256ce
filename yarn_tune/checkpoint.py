"""A run's resumable state on disk: small, readable without yarn_tune, never half-written.

A checkpoint is a folder `step-000050/` with `state.safetensors` (learned offsets, optimizer moments) and
`state.json` (step, and the SHA-256 of the tensors). It is written under another name, flushed to disk, and then
renamed; one whose checksum does not hold is skipped in favour of the one before. An export gets its name the same way.
"""

import ctypes
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

LEARNED = "learned.safetensors"
"""What a finished run has learned: its offsets, in the run folder."""

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of renameat2(2)."""


@dataclass(frozen=True)
class State:
    """Everything a run continues from. Rows and rates are functions of `step`, so they need no state."""

    step: int
    """Steps done."""
    numbers: Tensors
    optimizer: Tensors


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut.

    Raises:
        UserError: if it cannot be written, as on a full disk; what was there before stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> UserError:
    """What to tell when a file cannot be written."""
    return UserError(
        f"{path} cannot be written ({error.strerror}); everything saved before is kept. Make room, and the same "
        "command continues"
    )


def flush_folder(folder: Path) -> None:
    """Renames in a folder reach the disk (Windows has no such thing)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(partial: Path, target: Path) -> None:
    """Give a finished folder its name; one that has the name already is there whole until this one is, then deleted."""
    for path in partial.iterdir():
        flush_folder(path)  # a file is flushed alike
    flush_folder(partial)
    if target.exists():
        _exchange(partial, target)
    else:
        partial.rename(target)
    flush_folder(target.parent)
    shutil.rmtree(partial, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Swap two names at once, where the system can (Linux); elsewhere one after the other."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one.absolute()), os.fsencode(other.absolute())
    if hasattr(libc, "renameat2") and libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return
    aside = other.with_name(f".{other.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


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
