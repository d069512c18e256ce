"""Read the records of document files, and locate each record in its file.

A text file is one record; a line of JSON lines, an entry of a JSON list and a row of a Parquet file are one each.
Offsets in messages count bytes and lines of the file, after decompression where it is compressed.
"""

import codecs
import io
import json
import shlex
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError
from ..recipe import COMPRESSED, HUB, KINDS, kind_of
from .compression import check_signature, opened

try:  # needed for .parquet files and for datasets on the hub only
    import datasets
    import pyarrow
    import pyarrow.parquet
except ImportError:
    datasets = pyarrow = None  # type: ignore[assignment, unused-ignore]
READ_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
if pyarrow is not None:
    READ_ERRORS = (*READ_ERRORS, pyarrow.ArrowException)

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
LARGEST_DOCUMENT = 1 << 25
"""Most bytes of a text file or of a line of JSON lines. Tokenizing a document takes some 140 times its size."""
LARGEST_WHOLE = 1 << 29
"""Most bytes of a file that is decoded as a whole: .json, and JSON lines in UTF-16. It takes 3 to 25 times its size."""
TOO_LARGE = "is larger than {:,} bytes, the limit of one document; split it into several"


@dataclass(frozen=True)
class Record:
    """One row of a file. If it cannot be read, `problem` is the reason and `values` is empty."""

    where: str
    values: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def read_records(path: Path, place: str, columns: tuple[str, ...]) -> Iterator[Record]:
    """Yield the records of one file.

    Args:
        path: a file of a known kind.
        place: key of the recipe, with which every message begins.
        columns: fields that are used; the text of a text file is in the first. Other Parquet columns are not decoded.

    Raises:
        UserError: if the file as a whole cannot be read: damaged, of another kind than its name, not UTF-8 or UTF-16.
    """
    where = f"{place}: {path}"
    found = kind_of(str(path))
    if found is None:
        raise UserError(
            f"{where}: unknown kind of file; known: {', '.join(KINDS)}, all but .parquet also with "
            f"{' or '.join(COMPRESSED)}"
        )
    kind, compression = found
    try:
        check_signature(path, where, kind, compression)
        if kind == ".parquet":
            yield from _parquet_rows(path, where, columns)
        elif kind in (".jsonl", ".ndjson"):
            with opened(path, where, compression) as stream:
                yield from _json_lines(stream, path, where)
        else:
            with opened(path, where, compression) as stream:
                yield from _json_rows(stream, path, where) if kind == ".json" else _text(stream, path, where, columns)
    except READ_ERRORS as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{where}: cannot be read ({reason}); is the file complete?") from error


def _text(stream: BinaryIO, path: Path, where: str, columns: tuple[str, ...]) -> Iterator[Record]:
    """The record of a text file."""
    content = stream.read(LARGEST_DOCUMENT + 1)
    if len(content) > LARGEST_DOCUMENT:
        yield Record(where, problem=f"the file {TOO_LARGE.format(LARGEST_DOCUMENT)} files")
        return
    text = _decoded(content, path, where)
    yield Record(where, {columns[0]: text.replace("\r\n", "\n").replace("\r", "\n")})


def _whole(head: bytes, stream: BinaryIO, where: str, remedy: str) -> bytes:
    """All bytes of a file whose first bytes have been read; raises `UserError` if they are too many."""
    content = head + stream.read(LARGEST_WHOLE + 1 - len(head))
    if len(content) > LARGEST_WHOLE:
        raise UserError(f"{where}: is larger than {LARGEST_WHOLE:,} bytes, the limit of a file read whole; {remedy}")
    return content


def encoding_of(head: bytes) -> tuple[str, int]:
    """Return (encoding, length of the byte order mark) from a file's first bytes.

    UTF-16 without a mark is recognised by zero bytes at every second position, which UTF-8 text does not have.
    """
    for mark, name in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return name, len(mark)
    even, odd = head[0::2].count(0), head[1::2].count(0)
    for most, least, name in ((odd, even, "utf-16-le"), (even, odd, "utf-16-be")):
        if most and not least and (most > len(head) // 20 or not _is(head, "utf-8")) and _is(head, name):
            return name, 0
    return "utf-8", 0


def _is(head: bytes, encoding: str) -> bool:
    """Whether bytes, perhaps cut inside a character, are valid."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _decoded(content: bytes, path: Path, where: str) -> str:
    """Return a file's text without its byte order mark."""
    encoding, mark = encoding_of(content[: 1 << 16])
    try:
        return content[mark:].decode(encoding)
    except UnicodeDecodeError as error:
        at = mark + error.start
        line = content[mark:at].decode(encoding, "replace").count("\n") + 1
        raise UserError(f"{where}, line {line}: {_not_valid(content, at, encoding, path)}") from error


def _not_valid(content: bytes, at: int, encoding: str, path: Path, offset: int = 0) -> str:
    """Describe where bytes are not valid in the encoding, with a command that converts the file.

    `offset` is where `content` begins in the file.
    """
    problem = f"not valid {encoding.upper()} at byte {offset + at} (0x{content[at]:02X})"
    if encoding != "utf-8":
        return f"{problem}; is the file complete?"
    source = "WINDOWS-1252" if any(0x80 <= byte < 0xA0 for byte in content) else "LATIN1"
    name = shlex.quote(str(path))
    return (
        f"{problem}; if it is {source}, convert it with `iconv -f {source} -t UTF-8 {name} > NEW`, otherwise replace "
        f"{source} by its encoding"
    )


def _json_lines(stream: BinaryIO, path: Path, where: str) -> Iterator[Record]:
    """Records of JSON lines, read line by line; UTF-16 is read whole."""
    head = stream.read(1 << 16)
    encoding, mark = encoding_of(head)
    if encoding != "utf-8":
        text = _decoded(_whole(head, stream, where, "convert it to UTF-8, which is read line by line"), path, where)
        for number, line in enumerate(text.split("\n"), 1):
            yield from _json_line(line, f"{where}, line {number}")
        return
    offset = mark
    for number, (raw, length) in enumerate(_lines(head[mark:], stream), 1):
        place = f"{where}, line {number}"
        if length > LARGEST_DOCUMENT:
            yield Record(place, problem=f"the line {TOO_LARGE.format(LARGEST_DOCUMENT)} lines")
        else:
            try:
                yield from _json_line(raw.decode("utf-8"), place)
            except UnicodeDecodeError as error:
                yield Record(place, problem=_not_valid(raw, error.start, "utf-8", path, offset))
        offset += length


def _lines(head: bytes, stream: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(line, its length) of a stream whose first bytes have been read already; a line that is too large is cut."""
    *whole, rest = head.split(b"\n")
    for line in whole:
        yield line + b"\n", len(line) + 1
    while line := rest + stream.readline(max(LARGEST_DOCUMENT + 1 - len(rest), 0)):
        length, part, rest = len(line), line, b""
        while len(line) > LARGEST_DOCUMENT and part and not part.endswith(b"\n"):
            part = stream.readline(1 << 20)
            length += len(part)
        yield line, length


def _json_line(line: str, where: str) -> Iterator[Record]:
    if not line.strip():
        return
    try:
        yield _json_record(json.loads(line), where)
    except json.JSONDecodeError as error:
        yield Record(where, problem=f"not JSON ({error.msg} at character {error.pos + 1})")
    except (ValueError, RecursionError) as error:
        yield Record(where, problem=f"not JSON that can be read ({str(error).split(';')[0]})")


def _json_record(value: object, where: str) -> Record:
    if isinstance(value, dict):
        return Record(where, value)
    return Record(where, problem=f'must be an object such as {{"text": ...}}; found {kind_name(value)}')


def _json_rows(stream: BinaryIO, path: Path, where: str) -> Iterator[Record]:
    """Records of a JSON file: a list of objects, one object, or JSON lines under this name."""
    remedy = f"write it as JSON lines, which are read one by one: `jq -c '.[]' {shlex.quote(str(path))} > NEW.jsonl`"
    content = _whole(b"", stream, where, remedy)
    try:
        value = json.loads(_decoded(content, path, where))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise UserError(f"{where}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})") from error
        yield from _json_lines(io.BytesIO(content), path, where)
        return
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON that can be read ({str(error).split(';')[0]})") from error
    if isinstance(value, list):
        for number, each in enumerate(value, 1):
            yield _json_record(each, f"{where}, row {number}")
    else:
        yield _json_record(value, where)


def _parquet_rows(path: Path, where: str, columns: tuple[str, ...]) -> Iterator[Record]:
    """Records of a Parquet file, with the columns that are used."""
    _need_datasets(where)
    file = pyarrow.parquet.ParquetFile(path)
    present = file.schema_arrow.names
    used = [name for name in columns if name in present]
    if not used:
        raise UserError(f"{where}: no column {columns[0]!r} (found {', '.join(present)}); name it in data.text_key")
    number = 0
    for batch in file.iter_batches(batch_size=64, columns=used):
        for at in range(batch.num_rows):
            number += 1
            place = f"{where}, row {number}"
            try:
                yield Record(place, {name: batch.column(name)[at].as_py() for name in used})
            except UnicodeDecodeError as error:
                yield Record(place, problem=f"its text is not valid UTF-8 at byte {error.start}")


def hub_records(place: str, name: str, columns: tuple[str, ...]) -> Iterator[Record]:
    """Stream a dataset: `hub:org/name`, `hub:org/name:split` or `hub:org/name@config:split`.

    Raises:
        UserError: if it cannot be read.
    """
    _need_datasets(f"{place}: {name}")
    dataset, _, split = name.removeprefix(HUB).partition(":")
    dataset, _, config = dataset.partition("@")
    try:
        stream = datasets.load_dataset(dataset, config or None, split=split or "train", streaming=True)
        if used := [column for column in columns if column in (stream.column_names or [])]:
            stream = stream.select_columns(used)
        for number, values in enumerate(stream, 1):
            yield Record(f"{place}: {name}, row {number}", dict(values))
    except Exception as error:  # the hub client has no common base class for what can go wrong
        raise UserError(f"{place}: {name!r} could not be read from the hub: {error}") from error


def kind_name(value: object) -> str:
    """Name a JSON or Parquet value's type, as printed in messages."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object",
             bytes: "bytes", type(None): "null"}  # fmt: skip
    return names.get(type(value), f"a {type(value).__name__}")


def _need_datasets(where: str) -> None:
    if datasets is None:
        raise UserError(f"{where}: reading this needs the package `datasets`; pip install datasets")
