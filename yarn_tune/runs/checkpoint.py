"""The resumable state of a run on disk: small, readable without yarn_tune, never half-written.

A checkpoint is a folder `step-000050/` with `state.safetensors` (learned offsets and optimizer moments) and
`state.json` (step, SHA-256 of the tensors, digests of the inputs, and a checksum of all of these). It is written under
another name, flushed to disk, and then renamed. A damaged checkpoint is skipped in favour of the one before.
"""

import hashlib
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..errors import UserError
from ..files import Tensors, partial_of, put_in_place, read_bytes, read_checked, write_atomically, write_checked

LEARNED = "learned.safetensors"
"""Learned offsets of a finished run, in the run folder."""

STEP = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class State:
    """Everything a run continues from. Batches and learning rates are functions of `step`, so they need no state."""

    step: int
    """Steps done."""
    numbers: Tensors
    """Learned offsets by name."""
    optimizer: Tensors
    average: Tensors = field(default_factory=dict)
    """Sums of the learned offsets for their average, where the run averages them."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Name of an input of the run (documents, weights, ...) -> digest."""


def save_state(folder: Path, state: State, keep: int, every: int = 1) -> None:
    """Write `state` under `folder` and delete older checkpoints; the caller holds the run's lock.

    The last `keep` checkpoints after a multiple of `every` steps stay, and the newest one. One that a signal caused in
    between does not count, so that an interrupted run has the same earlier checkpoints.

    Raises:
        UserError: if it cannot be written; the checkpoints before it stay.
    """
    tensors = {f"numbers.{name}": tensor.contiguous() for name, tensor in state.numbers.items()}
    tensors |= {f"optimizer.{name}": tensor.contiguous() for name, tensor in state.optimizer.items()}
    tensors |= {f"average.{name}": tensor.contiguous() for name, tensor in state.average.items()}
    content = save(tensors)
    target = folder / f"step-{state.step:06d}"
    partial = partial_of(target)
    try:
        write_atomically(partial / "state.safetensors", content)
        about = {"step": state.step, "tensors": hashlib.sha256(content).hexdigest(), "inputs": state.inputs}
        write_checked(partial / "state.json", about)
        put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    found = checkpoints(folder)
    regular = [path for path in found if int(path.name.removeprefix("step-")) % every == 0]
    for old in found[:-1]:
        if old not in regular[-keep:]:
            shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by their number of steps."""
    numbered = [(int(match[1]), path) for path in folder.glob("step-*") if (match := STEP.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def latest_state(folder: Path, report: bool = False) -> State | None:
    """The newest undamaged checkpoint, or None; with `report`, a line on stderr names each one that is skipped."""
    for target in reversed(checkpoints(folder)):
        try:
            return load_state(target)
        except UserError as error:
            if report:
                print(f"yarn-tune: {target} is damaged and is skipped: {error}", file=sys.stderr)
    return None


def read_state(target: Path) -> State | None:
    """The checkpoint in this folder; None if there is none or it is damaged."""
    try:
        return load_state(target)
    except UserError:
        return None


def load_state(target: Path) -> State:
    """The checkpoint in this folder.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    about = read_checked(target / "state.json", "the checkpoint cannot be used")
    try:
        content = read_bytes(target / "state.safetensors")
        match = STEP.fullmatch(target.name)
        if hashlib.sha256(content).hexdigest() != about["tensors"] or (match and int(match[1]) != about["step"]):
            raise ValueError("its checksum does not match its content")
        tensors = load(content)
        numbers, optimizer, average = (_part(tensors, part) for part in ("numbers.", "optimizer.", "average."))
        return State(about["step"], numbers, optimizer, average, about["inputs"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{target}: the checkpoint cannot be used ({error})") from error


def _part(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def check_inputs(state: State, now: dict[str, str], folder: Path) -> None:
    """Check that a run continues with the inputs it was started with.

    Args:
        state: the state to continue from.
        now: name of an input -> its current digest.
        folder: the run folder, for the message.

    Raises:
        UserError: if inputs changed; the message names all of them.
    """
    if changed := [name for name, digest in now.items() if state.inputs.get(name, digest) != digest]:
        raise UserError(
            f"{folder}: since this run was started, these of its inputs changed: {', '.join(changed)}. Put them back "
            "as they were and the same command continues; or train anew under another name="
        )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The moments and step counts of an optimizer, as a flat dict."""
    states = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value.detach().cpu().clone()
        for index, state in states.items()
        for name, value in state.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Load what `optimizer_tensors` returned."""
    states: dict[int, Tensors] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        states.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
