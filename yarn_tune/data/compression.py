"""Open document files, compressed or not, with a bound on how far a small file may expand."""

import gzip
import importlib
import io
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import UserError

SIGNATURES = (
    (b"\x1f\x8b", "a gzip file", ".gz"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", ".zst"),
    (b"PAR1", "a Parquet file", ".parquet"),
    (b"PK\x03\x04", "a zip archive", None),
)
"""First bytes of a file, its kind, and the ending that its name must have; zip archives are not read."""

MOST_EXPANSION, UNSUSPICIOUS = 200, 1 << 30
"""Most decompressed bytes per byte of a file, beyond the first GiB. Text expands by 3 to 10, a bomb by 1000."""


def check_signature(path: Path, where: str, kind: str, compression: str) -> None:
    """Refuse a file whose first bytes contradict its name."""
    with open(path, "rb") as file:
        head = file.read(4)
    expected = kind if kind == ".parquet" else compression
    for signature, name, ending in SIGNATURES:
        if head.startswith(signature) and ending != expected:
            remedy = f"rename it to {path.name}{ending}" if ending else "unpack it"
            raise UserError(f"{where}: this is {name}; {remedy}")
    if compression and head and not any(head.startswith(s) for s, _, ending in SIGNATURES if ending == compression):
        raise UserError(f"{where}: this is not compressed, although its name ends in {compression}; rename it")


def opened(path: Path, where: str, compression: str) -> BinaryIO:
    """Open a file for reading its decompressed bytes.

    Reading raises UserError where a compressed file expands without measure, and OSError where it is damaged.
    """
    if not compression:
        return open(path, "rb")
    opener = _gzip if compression == ".gz" else _zstandard
    raw, error = opener(path, where)
    return cast(BinaryIO, io.BufferedReader(_Decompressed(raw, error, where, path.stat().st_size), 1 << 16))


def _gzip(path: Path, where: str) -> tuple[Any, type[Exception]]:
    return gzip.open(path, "rb"), OSError  # noqa: SIM115  (closed by the reader)


def _zstandard(path: Path, where: str) -> tuple[Any, type[Exception]]:
    """(reader, its exception) of Python 3.14's own module, or of the package `zstandard`."""
    for name in ("compression.zstd", "zstandard"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if name == "compression.zstd":
            return module.open(path, "rb"), module.ZstdError
        file = open(path, "rb")  # noqa: SIM115  (closed by the reader)
        raw = module.ZstdDecompressor().stream_reader(file, read_across_frames=True, closefd=True)
        return raw, module.ZstdError
    raise UserError(f"{where}: .zst needs the package zstandard (pip install zstandard), or Python 3.14; or unpack it")


class _Decompressed(io.RawIOBase):
    """A decompressing reader that counts what it gives, and whose errors are `OSError`, as those of other files are."""

    def __init__(self, raw: Any, error: type[Exception], where: str, size: int) -> None:
        self._raw, self._error, self._where = raw, error, where
        self._size, self._limit, self._count = size, max(UNSUSPICIOUS, MOST_EXPANSION * size), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count = int(self._raw.readinto(buffer))
        except self._error as error:
            raise OSError(str(error)) from error
        self._count += count
        if self._count > self._limit:
            raise UserError(
                f"{self._where}: its {self._size:,} bytes expand to more than {self._limit:,}, as those of a file made "
                "to fill the memory; if it is none, unpack it"
            )
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()
