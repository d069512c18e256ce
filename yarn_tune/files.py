"""Files and folders written whole or not at all, also after a kill or a power cut; safetensors read with a message."""

import ctypes
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from .errors import UserError

Tensors = dict[str, Tensor]


AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of renameat2(2)."""


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
