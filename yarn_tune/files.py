"""Atomic and durable file writes, reads that verify checksums, and folder locks.

Every file that a later command relies on (learned parameters, checkpoints, measurements, token lists) contains a
SHA-256 of its content: in the metadata of a safetensors file, or under the key `sha256` of a JSON object. A file whose
checksum does not match is never used: the command refuses it or computes its content again.
"""

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .errors import UserError

Tensors = dict[str, Tensor]

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Arguments of renameat2(2)."""

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that freeing disk space resolves."""

CHECKSUM = "sha256"
"""Key of a checksum, in JSON objects and in the metadata of safetensors files."""

PARTIAL = ".*.partial"
"""Names of files and folders that are being written, or that a killed process left behind."""

CHECKSUMS = "checksums.json"
"""Name of the file in an export that lists the export's files and their SHA-256."""

CARD = "README.md"
"""Name of the model card of an export. Users may edit it: it is the one listed file whose change is only a note."""

LOCK = ".lock"


def partial_of(path: Path) -> Path:
    """The name under which this process writes `path` before it renames it."""
    return path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically and durably: after a crash or power failure it has the old content or the new.

    Raises:
        UserError: if it cannot be written, for example on a full disk; the previous content is kept.
    """
    try:
        partial = partial_of(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            flush_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError | ValueError) -> UserError:
    """The error to raise when a file or folder cannot be written, with a remedy that fits the reason."""
    code, reason = getattr(error, "errno", None) or 0, getattr(error, "strerror", None) or str(error)
    remedies = {
        **dict.fromkeys(FULL_DISK, "Make room and run the same command again"),
        **dict.fromkeys((errno.EACCES, errno.EPERM), "Change the permissions of its folder, or write elsewhere"),
        errno.EROFS: "The file system is read-only; write elsewhere",
        **dict.fromkeys(
            (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP),
            "A file, folder or link of another kind is in the way; move it",
        ),
    }
    remedy = remedies.get(code, "Check the path")
    return UserError(f"{printable(path)} cannot be written ({reason}); everything saved before is kept. {remedy}")


def unreadable(path: Path, error: Exception, remedy: str) -> UserError:
    """The error to raise when a file cannot be read or is damaged."""
    reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0] or type(error).__name__
    return UserError(f"{printable(path)} cannot be read ({reason}); {remedy}")


def printable(path: Path) -> str:
    """A path as printed in messages: without control characters, cut to 300 characters."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))
    return text if len(text) <= 300 else text[:140] + "..." + text[-150:]


def flush_folder(folder: Path) -> None:
    """Flush the renames in a folder to the disk (Windows has no such call)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(partial: Path, target: Path) -> None:
    """Rename a finished folder to its final name, and delete the folder that had this name before.

    The old folder is complete until the rename. The caller must hold the lock (`locked`) of the parent folder.

    Raises:
        UserError: if it cannot be renamed.
    """
    try:
        for path in partial.iterdir():
            flush_folder(path)  # flushes files too
        flush_folder(partial)
        if target.is_dir() and not target.is_symlink():
            _exchange(partial, target)
        else:
            partial.rename(target)
        flush_folder(target.parent)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Swap two names atomically where the system supports it (Linux), otherwise by three renames."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one.absolute()), os.fsencode(other.absolute())
    if hasattr(libc, "renameat2") and libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return
    aside = _aside(other)
    shutil.rmtree(aside, ignore_errors=True)
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


@contextlib.contextmanager
def locked(folder: Path, only: str = "") -> Iterator[None]:
    """Hold the lock of a run folder (or adapter folder) while writing to it; a killed process releases its lock.

    Partial files that killed processes left in the folder are deleted first. With `only`, the lock is for one name in
    the folder, and the rest of the folder is left alone.

    Raises:
        UserError: if another process holds the lock, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / (f".{only}{LOCK}" if only else LOCK))
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"{folder}: another yarn-tune process is writing there; wait until it ends, or give this run another name="
        ) from error
    except (OSError, ValueError, NotImplementedError) as error:
        failed = error if isinstance(error, OSError) else OSError(errno.ENOLCK, str(error))
        raise unwritable(folder / LOCK, failed) from error
    try:
        _tidy(folder, glob.escape(only))
        yield
    finally:
        lock.release()


def _tidy(folder: Path, only: str) -> None:
    """Delete partial files that killed processes left; restore a folder whose replacement was interrupted."""
    for aside in folder.glob(f".{only or '*'}.replaced"):
        target = aside.with_name(aside.name.removesuffix(".replaced")[1:])
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(target)
    patterns = [f".{only}.*.partial"] if only else [PARTIAL, f"*/{PARTIAL}", f"*/*/{PARTIAL}"]
    for stale in [found for pattern in patterns for found in folder.glob(pattern)]:
        inside = stale.relative_to(folder).parts
        if len(inside) > 1 and (folder / inside[0] / LOCK).exists():
            continue  # a run inside this one (eval.native_adapted), which another process may be training
        if stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                stale.unlink()


def readable_by_all(path: Path) -> None:
    """Set a file's permissions by the umask, for files that a library creates readable by their owner only."""
    mask = os.umask(0o022)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_json(path: Path, value: Any) -> None:
    """Write a value atomically as JSON, indented by one space."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path, remedy: str) -> Any:
    """Return the value in a JSON file.

    Raises:
        UserError: if it is missing, unreadable or not JSON; the message ends with `remedy`.
    """
    try:
        return json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error, remedy) from error


def read_bytes(path: Path) -> bytes:
    """Return a regular file's content; raises OSError for anything else, for example a FIFO, which would block."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return path.read_bytes()


def with_checksum(value: dict[str, Any]) -> dict[str, Any]:
    """Return the object with a checksum of all its other values added."""
    rest = {key: each for key, each in value.items() if key != CHECKSUM}
    return rest | {CHECKSUM: hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def has_checksum(value: Any) -> bool:
    """Whether a value read from JSON is an object with a correct checksum."""
    return isinstance(value, dict) and with_checksum(value) == value


def write_checked(path: Path, value: dict[str, Any]) -> None:
    """Write an object as JSON, with a checksum."""
    # Convert through JSON first, so that the checksum covers what a reader gets: number keys become text, for example.
    write_json(path, with_checksum(json.loads(json.dumps(value))))


def read_checked(path: Path, remedy: str) -> dict[str, Any]:
    """Read an object that `write_checked` wrote.

    Raises:
        UserError: if it is missing, unreadable or changed; the message ends with `remedy`.
    """
    value = read_json(path, remedy)
    if not has_checksum(value):
        raise unreadable(path, ValueError("its checksum does not match its content"), remedy)
    return {key: each for key, each in value.items() if key != CHECKSUM}


def tensors_digest(tensors: Tensors, more: str = "") -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of tensors, and over the text `more`."""
    digest = hashlib.sha256(more.encode())
    for name in sorted(tensors):
        stored = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {stored.dtype} {list(stored.shape)}".encode())
        digest.update(stored.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_tensors(tensors: Tensors, metadata: dict[str, str] | None = None, more: str = "") -> bytes:
    """The content of a safetensors file with a checksum of tensors and metadata (and of `more`) in its metadata."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    kept = dict(metadata or {})
    checksum = tensors_digest(plain, json.dumps(kept, sort_keys=True) + more)
    return save(plain, metadata=kept | {CHECKSUM: checksum})


def read_tensors(path: Path, more: str = "", known: tuple[str, ...] = ("format",)) -> Tensors:
    """Read a safetensors file; its checksum must match, if it has one (adapters that PEFT saved have none).

    Raises:
        UserError: if it is damaged or cut short.
    """
    tensors, metadata = read_tensors_and_metadata(path, more)
    if unknown := sorted({*metadata} - {*known}):
        raise unreadable(path, ValueError(f"unknown metadata {unknown[0]!r}"), REMAKE)
    return tensors


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content; raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


REMAKE = "delete it and run the same command again"


def read_tensors_and_metadata(path: Path, more: str = "", required: bool = False) -> tuple[Tensors, dict[str, str]]:
    """(tensors, metadata without the checksum) of a safetensors file; raises as `read_tensors`.

    Args:
        path: the safetensors file.
        more: the text that was passed to `save_tensors`.
        required: whether a file without a checksum is refused.
    """
    try:
        content = read_bytes(path)
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata: dict[str, str] = header.get("__metadata__") or {}
        given = metadata.pop(CHECKSUM, None)
        computed = None if given is None else tensors_digest(tensors, json.dumps(metadata, sort_keys=True) + more)
        if given != computed or (required and given is None):
            raise ValueError("its checksum does not match its content")
    except (SafetensorError, OSError, ValueError, KeyError, OverflowError, RuntimeError) as error:
        raise unreadable(path, error, REMAKE) from error
    return tensors, metadata
