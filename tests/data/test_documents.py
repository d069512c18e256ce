"""Documents as people have them: every kind of file, each with the token ids that it must give, or the message.

The right ids come from the tokenizer on the text that was written, or from a table below; never from the reader.
"""

import gzip
import json
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny import base_with, recipe_tree, rows_of, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from yarn_tune.data import compression, documents, readers, tokenization
from yarn_tune.data.documents import FEWEST, Need, read_documents
from yarn_tune.data.tokenization import Encoder, end_of_text
from yarn_tune.errors import UserError
from yarn_tune.recipe import load_recipe, matching_files
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.recipe.schema import Data

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CHATML = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


def byte_tokenizer(*special: str, **names: str) -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, so that the right ids of any text are known without it; then the special tokens."""
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": list(special), **names})
    return fast


PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTED]
LETTERS = {byte: BYTES.index(chr(byte)) for byte in PRINTED}
LETTERS |= {byte: BYTES.index(chr(256 + number)) for number, byte in enumerate(OTHERS)}
"""GPT-2's table of bytes and letters, written out from its definition."""


def ids_of(text: str) -> list[int]:
    return [LETTERS[byte] for byte in text.encode()]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_with(byte_tokenizer("<s>", "[SEP]", eos_token="<eos>"), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    tokenizer = byte_tokenizer("<|endoftext|>", "<|im_start|>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return base_with(tokenizer, tmp_path_factory.mktemp("chat"))


def read(base, files, **keys):
    """The documents under some names, as lists, each with the end-of-text token behind it."""
    data = Data(train=[str(file) for file in files], heldout=["none"], **keys)
    found = read_documents(data, "data.train", data.train, base)
    return [document.tolist() for document in found], found.account


def ended(base, *texts: str) -> list[list[int]]:
    eos = base.tokenizer.convert_tokens_to_ids("<eos>")
    return [[*ids_of(text), eos] for text in texts]


TEXT = "Zoë said: 早安 🙂\nand left.\n"
LINES = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in (TEXT, "second"))
ROWS = [{"text": TEXT}, {"text": "second"}]


@dataclass(frozen=True)
class File:
    """A file that is read, and the documents in it."""

    name: str
    content: bytes
    texts: tuple[str, ...] = (TEXT,)


def gz(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


READABLE = [
    File("plain.txt", TEXT.encode()),
    File("empty-lines.txt", b"\n\na\n", ("\n\na\n",)),
    File("windows.txt", TEXT.replace("\n", "\r\n").encode()),
    File("old-mac.txt", TEXT.replace("\n", "\r").encode()),
    File("utf8-mark.txt", b"\xef\xbb\xbf" + TEXT.encode()),
    File("utf16-le-mark.txt", b"\xff\xfe" + TEXT.encode("utf-16-le")),
    File("utf16-be-mark.txt", b"\xfe\xff" + TEXT.encode("utf-16-be")),
    File("utf16-le.txt", TEXT.encode("utf-16-le")),
    File("utf16-be.txt", TEXT.encode("utf-16-be")),
    File("utf16-chinese.txt", ("早安。\n" * 50).encode("utf-16-le"), ("早安。\n" * 50,)),
    File("utf32-le-mark.txt", b"\xff\xfe\0\0" + TEXT.encode("utf-32-le")),
    File("utf32-be-mark.txt", b"\0\0\xfe\xff" + TEXT.encode("utf-32-be")),
    File("one-zero-byte.txt", b"a\0b and much more text " * 9, ("a\0b and much more text " * 9,)),
    File("markdown.md", TEXT.encode()),
    File("UPPER.TXT", TEXT.encode()),
    File("Mixed.Md", TEXT.encode()),
    File("packed.txt.gz", gz(TEXT.encode())),
    File("packed.TXT.GZ", gz(TEXT.encode())),
    File("packed-mark.txt.gz", gz(b"\xef\xbb\xbf" + TEXT.encode())),
    File("two-members.txt.gz", gz(TEXT[:9].encode()) + gz(TEXT[9:].encode())),
    File("lines.jsonl", LINES.encode(), (TEXT, "second")),
    File("lines.ndjson", LINES.encode(), (TEXT, "second")),
    File("LINES.JSONL", LINES.encode(), (TEXT, "second")),
    File("mark.jsonl", b"\xef\xbb\xbf" + LINES.encode(), (TEXT, "second")),
    File("windows.jsonl", LINES.replace("\n", "\r\n").encode(), (TEXT, "second")),
    File("utf16-mark.jsonl", b"\xff\xfe" + LINES.encode("utf-16-le"), (TEXT, "second")),
    File("utf16-be.jsonl", LINES.encode("utf-16-be"), (TEXT, "second")),
    File("blank-lines.jsonl", LINES.replace("\n", "\n\n  \n").encode() + b"\n\n", (TEXT, "second")),
    File("line-separators.jsonl", '{"text": "a\u2028b\u0085c"}\n'.encode(), ("a\u2028b\u0085c",)),
    File("packed.jsonl.gz", gz(LINES.encode()), (TEXT, "second")),
    File("packed.ndjson.gz", gz(LINES.encode()), (TEXT, "second")),
    File("long-line.jsonl", json.dumps({"text": "x" * 200_000}).encode(), ("x" * 200_000,)),
    File("lines-over-64k.jsonl", (json.dumps({"text": "y" * 999}) + "\n").encode() * 100, ("y" * 999,) * 100),
    File("list.json", json.dumps(ROWS).encode(), (TEXT, "second")),
    File("pretty.json", json.dumps(ROWS, indent=2).encode(), (TEXT, "second")),
    File("object.json", json.dumps(ROWS[0]).encode()),
    File("mark.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode(), (TEXT, "second")),
    File("lines-as.json", LINES.encode(), (TEXT, "second")),
    File("packed.json.gz", gz(json.dumps(ROWS).encode()), (TEXT, "second")),
    File("other-fields.jsonl", b'{"id": 1, "text": "a", "when": null, "score": 1e999}\n', ("a",)),
    File("empty-documents.jsonl", b'{"text": ""}\n{"text": " \\n"}\n{"text": "a"}\n', ("a",)),
    File("a[1].txt", TEXT.encode()),
    File("a b.txt", TEXT.encode()),
]


@pytest.mark.parametrize("file", READABLE, ids=lambda file: file.name)
def test_readable(base, tmp_path, file):
    path = tmp_path / file.name
    path.write_bytes(file.content)
    assert read(base, [path])[0] == ended(base, *file.texts)


REFUSED = [
    (
        "latin1.txt",
        "ab\ncafé au lait".encode("latin-1"),
        "line 2: not valid UTF-8 at byte 6 (0xE9); if it is LATIN1, convert it with `iconv -f LATIN1 -t UTF-8 ",
    ),
    (
        "windows-1252.txt",
        "“quoted” café".encode("cp1252"),
        "line 1: not valid UTF-8 at byte 0 (0x93); if it is WINDOWS-1252, convert",
    ),
    ("late.txt", b"x" * 70_000 + b"\n" + b"\xff", "line 2: not valid UTF-8 at byte 70001 (0xFF)"),
    ("mark-then-latin1.txt", b"\xef\xbb\xbfab\xe9", "line 1: not valid UTF-8 at byte 5 (0xE9)"),
    (
        "late.jsonl",
        b'{"text": "a"}\n' * 6000 + b'{"text": "caf\xe9"}\n',
        "line 6001: not valid UTF-8 at byte 84013 (0xE9)",
    ),
    ("odd.txt", b"\xff\xfea\0b", "not valid UTF-16-LE at byte 4"),
    ("gzip.txt", gz(b"a"), "this is a gzip file; rename it to gzip.txt.gz"),
    ("gzip.jsonl", gz(b"a"), "this is a gzip file; rename it to gzip.jsonl.gz"),
    ("plain.jsonl.gz", b'{"text": "a"}', "this is not compressed, although its name ends in .gz"),
    ("zstd.jsonl.gz", b"\x28\xb5\x2f\xfd....", "this is a Zstandard file; rename it to"),
    ("zip.txt", b"PK\x03\x04....", "this is a zip archive; unpack it"),
    ("parquet.jsonl", b"PAR1....", "this is a Parquet file; rename it to parquet.jsonl.parquet"),
    ("torn.txt.gz", gz(bytes(range(256)) * 99)[:200], "is the file complete?"),
    ("table.csv", b"a,b", "unknown kind of file; known: .txt, .md, .jsonl, .ndjson, .json, .parquet"),
    ("packed.parquet.gz", gz(b"a"), "unknown kind of file"),
    ("none", b"a", "unknown kind of file"),
    ("torn.json", b'[{"text": "a"},\n {"text": ', "line 2: not JSON"),
    ("number.json", b"7", 'must be an object such as {"text": ...}; found a number'),
    ("texts.json", b'["a", "b"]', 'row 1: must be an object such as {"text": ...}; found text'),
    ("null.jsonl", b'{"text": "a"}\n{"text": null}\n', "line 2: 'text' must be text; found null"),
    ("list.jsonl", b'{"text": ["a", "b"]}\n', "line 1: 'text' must be text; found a list"),
    ("number.jsonl", b'{"text": 5}\n', "line 1: 'text' must be text; found a number"),
    ("object.jsonl", b'{"text": {"a": 1}}\n', "line 1: 'text' must be text; found an object"),
    (
        "missing.jsonl",
        b'{"text": "a"}\n\n{"body": "a", "id": 1}\n',
        "line 3: no text under 'text' (found body, id); name the field in data.text_key",
    ),
    ("nothing.jsonl", b"{}\n", "line 1: no text under 'text' (found nothing)"),
    ("surrogate.jsonl", b'{"text": "ab\\ud83d"}\n', "line 1: its text has a lone surrogate (U+D83D) at character 3"),
    ("array.jsonl", b"[1]\n", "line 1: must be an object such as"),
    ("cut.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON (Expecting value at character 11)"),
    ("deep.jsonl", b'{"text": ' + b"[" * 100_000 + b"}\n", "line 1: not JSON"),
    (
        "messages.jsonl",
        b'{"messages": [{"role": "user", "content": "a"}]}\n',
        "line 1: messages need a chat template, which this tokenizer lacks",
    ),
    (
        "float.jsonl",
        b'{"input_ids": [1, 2.0]}\n',
        "line 1: input_ids must be a list of whole numbers; found the number 2.0 at position 2",
    ),
    (
        "boolean.jsonl",
        b'{"input_ids": [true, 2]}\n',
        "input_ids must be a list of whole numbers; found a boolean at position 1",
    ),
    ("words.jsonl", b'{"input_ids": ["5"]}\n', "input_ids must be a list of whole numbers; found text at position 1"),
    ("text.jsonl", b'{"input_ids": "1 2"}\n', "input_ids must be a list of whole numbers; found text"),
    (
        "batch.jsonl",
        b'{"input_ids": [[1, 2]]}\n',
        "input_ids must be a list of whole numbers; found a list at position 1",
    ),
    ("beyond.jsonl", b'{"input_ids": [1, 300]}\n', "input_ids reach 300, outside the base's vocabulary of 259 tokens"),
    ("negative.jsonl", b'{"input_ids": [1, -100]}\n', "input_ids reach -100, outside"),
    ("huge.jsonl", b'{"input_ids": [1, 99999999999999999999]}\n', "input_ids must be whole numbers of at most 8 bytes"),
    (
        "hole.jsonl",
        b'{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}\n',
        "attention_mask hides tokens in the middle",
    ),
    (
        "short-mask.jsonl",
        b'{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}\n',
        "attention_mask must be 3 numbers 0 or 1",
    ),
    ("weights.jsonl", b'{"input_ids": [1, 2], "attention_mask": [1, 2]}\n', "attention_mask must be 2 numbers 0 or 1"),
    (
        "prompt.jsonl",
        b'{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}\n',
        "labels are not input_ids (1 of 3 tokens count)",
    ),
    (
        "shifted.jsonl",
        b'{"input_ids": [1, 2, 3], "labels": [2, 3, 4]}\n',
        "labels are not input_ids (3 of 3 tokens count)",
    ),
]


def check_refused(base, path, content, message):
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(base, [path])
    assert str(caught.value).startswith(f"data.train: {path}")
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "content", "message"), REFUSED, ids=[each[0] for each in REFUSED])
def test_refused(base, tmp_path, name, content, message):
    check_refused(base, tmp_path / name, content, message)


LIMIT = 100_000
LARGE = "z" * LIMIT
"""Text whose document is larger than the limit in these tests."""


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", line("a") + line(LARGE), "line 2: the line is larger than 100,000 bytes, the limit of one"),
        ("first.jsonl", line(LARGE) + line("a"), "line 1: the line is larger"),
        ("endless.jsonl", b"\0" * 5 * LIMIT, "line 1: the line is larger"),
        ("packed.jsonl.gz", gz(line("a") + line(LARGE)), "line 2: the line is larger"),
        ("a.txt", LARGE.encode() + b"z", "the file is larger than 100,000 bytes, the limit of one document; split"),
        ("packed.md.gz", gz(LARGE.encode() + b"z"), "the file is larger"),
        ("list.json", json.dumps([{"text": "a"}, {"text": LARGE + "z"}]).encode(), "row 2: its text is larger"),
        ("whole.json", b"[" + b" " * 3 * LIMIT + b"]", "larger than 250,000 bytes, the limit of a file read whole"),
        ("whole.json.gz", gz(b"[" + b" " * 3 * LIMIT + b"]"), "`jq -c '.[]' "),
        ("utf16.jsonl", line(LARGE).decode().encode("utf-16") * 2, "read whole; convert it to UTF-8"),
        ("bomb.jsonl.gz", gz(b"\n" * 500_000), " bytes expand to more than 400,000, as those of a file made to fill"),
        ("bomb.txt.gz", gz(b"\n" * 500_000), "the file is larger"),
    ],
)  # fmt: skip
def test_files_without_measure(base, tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(readers, "LARGEST_DOCUMENT", LIMIT)
    monkeypatch.setattr(tokenization, "LARGEST_DOCUMENT", LIMIT)
    monkeypatch.setattr(readers, "LARGEST_WHOLE", 250_000)
    monkeypatch.setattr(compression, "UNSUSPICIOUS", 400_000)
    check_refused(base, tmp_path / name, content, message)


def test_a_line_that_is_too_large_can_be_skipped(base, tmp_path, monkeypatch):
    """The lines after it are read, with their own numbers and offsets."""
    monkeypatch.setattr(readers, "LARGEST_DOCUMENT", LIMIT)
    path = tmp_path / "a.jsonl"
    path.write_bytes(line("a") + line(LARGE) + line("b") + line(LARGE * 9) + line("c"))
    ids, account = read(base, [path], skip_bad_rows=True)
    assert ids == ended(base, "a", "b", "c")
    assert account.skipped == 2
    wrong = tmp_path / "b.jsonl"
    wrong.write_bytes(line(LARGE) + b'{"text": "caf\xe9"}\n')
    second = list(readers.read_records(wrong, "data.train", ("text",)))[1]
    assert f"not valid UTF-8 at byte {len(line(LARGE)) + 13} (0xE9)" in second.problem


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz"])
def test_a_line_that_is_too_large_is_not_held_in_memory(tmp_path, name):
    """256 MiB without a line end, in a sparse file: a few times the limit of one document is held."""
    path, size = tmp_path / name, 1 << 28
    if name.endswith(".gz"):
        with gzip.open(path, "wb", 1) as file:
            for _ in range(size >> 20):
                file.write(bytes(1 << 20))
    else:
        with open(path, "wb") as file:
            file.truncate(size)
    tracemalloc.start()
    try:
        [record] = readers.read_records(path, "data.train", ("text",))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "is larger than 33,554,432 bytes, the limit of one document" in record.problem
    assert peak < 4 * readers.LARGEST_DOCUMENT


def test_there_are_enough_fixtures():
    assert len(READABLE) + len(REFUSED) >= 60


def test_the_iconv_command_converts_the_file(base, tmp_path):
    """The remedy in the message, run as it is."""
    import subprocess

    path, new = tmp_path / "it's café.txt", tmp_path / "new.txt"
    path.write_bytes("café\n".encode("latin-1"))
    with pytest.raises(UserError) as caught:
        read(base, [path])
    command = str(caught.value).split("`")[1].replace("NEW", str(new))
    subprocess.run(command, shell=True, check=True)
    assert read(base, [new])[0] == ended(base, "café\n")


# Rows


def test_bad_rows_are_skipped_and_counted(base, tmp_path):
    lines = [
        '{"text": "a"}',
        "not JSON",
        '{"text": null}',
        '{"text": "b"}',
        '{"text": "\\ud800"}',
        '{"input_ids": [1.5]}',
        '{"text": "c"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xe9"}\n')
    for _ in range(2):  # the second time from the cache
        found, account = read(base, [path], skip_bad_rows=True)
        assert found == ended(base, "a", "b", "c")
        assert account.skipped == 5
        assert account.reasons[:2] == (
            f"{path}, line 2: not JSON (Expecting value at character 1)",
            f"{path}, line 3: 'text' must be text; found null",
        )
        assert "5 rows are skipped" in account.notes("data.train")[0]
    with pytest.raises(UserError, match=r"line 2: not JSON .*\(data.skip_bad_rows: true skips such rows\)"):
        read(base, [path])


def test_parquet_decodes_only_the_columns_that_are_read(base, tmp_path):
    """A date beyond year 9999 cannot become a Python value, and an odd column is no matter."""
    path = tmp_path / "a.parquet"
    when = pyarrow.array([2**52, 0], pyarrow.timestamp("ms"))
    with pytest.raises((ValueError, OverflowError)):
        when.to_pylist()
    table = pyarrow.table({"when": when, "text": [TEXT, "second"], "raw": [b"\xff", None]})
    pyarrow.parquet.write_table(table, path)
    assert read(base, [path])[0] == ended(base, TEXT, "second")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pyarrow.array(["a", None]), "row 2: 'text' must be text; found null"),
        (pyarrow.array([b"a", b"b"]), "row 1: 'text' must be text; found bytes"),
        (pyarrow.array([["a"], []]), "row 1: 'text' must be text; found a list"),
        (pyarrow.array([1.5, 2.5]), "row 1: 'text' must be text; found a number"),
        (pyarrow.array([datetime(2020, 1, 1)] * 2), "row 1: 'text' must be text; found a datetime"),
        (pyarrow.array([b"ab\xff", b"b"]).view(pyarrow.string()), "row 1: its text is not valid UTF-8 at byte 2"),
    ],
)
def test_parquet_rows_name_what_was_found(base, tmp_path, values, message):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
    with pytest.raises(UserError, match=message):
        read(base, [path])


def test_parquet_of_every_string_type(base, tmp_path):
    strings = pyarrow.array(["a", "b", "a"])
    for number, kind in enumerate(
        (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    ):
        path = tmp_path / f"{number}.PARQUET"
        pyarrow.parquet.write_table(pyarrow.table({"text": strings.cast(kind)}), path)
        assert read(base, [path])[0] == ended(base, "a", "b", "a")


def test_a_parquet_file_without_the_column(base, tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), path)
    with pytest.raises(UserError, match=r"no column 'text' \(found body, id\); name it in data.text_key"):
        read(base, [path])
    assert read(base, [path], text_key="body")[0] == ended(base, "a")


def test_given_ids(base, tmp_path):
    eos = base.tokenizer.convert_tokens_to_ids("<eos>")
    rows = [
        ({"input_ids": [5, 6]}, [5, 6, eos]),
        ({"input_ids": [5, 6, eos]}, [5, 6, eos]),
        ({"input_ids": [5, 6], "text": "ignored"}, [5, 6, eos]),
        ({"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]}, [5, 6, eos]),
        ({"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1], "labels": [-100, 5, 6]}, [5, 6, eos]),
        ({"input_ids": [5, 6], "labels": [5, 6]}, [5, 6, eos]),
        ({"input_ids": None, "text": "a"}, [*ids_of("a"), eos]),
    ]
    path = tmp_path / "ids.jsonl"
    path.write_text("\n".join(json.dumps(row) for row, _ in rows))
    assert read(base, [path])[0] == [ids for _, ids in rows]
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": [[5, 6], [7]]}), tmp_path / "ids.parquet")
    assert read(base, [tmp_path / "ids.parquet"])[0] == [[5, 6, eos], [7, eos]]


# Names


def test_a_folder_is_all_readable_files_beneath_it(base, tmp_path):
    (tmp_path / "books" / "deep").mkdir(parents=True)
    for name in ("b.txt", "deep/a.md", "a.jsonl", ".hidden.txt", "deep/table.csv", "deep/.git"):
        (tmp_path / "books" / name).write_text('{"text": "jsonl"}' if name.endswith("jsonl") else name)
    assert read(base, [tmp_path / "books"])[0] == ended(base, "jsonl", "b.txt", "deep/a.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="data.train: the folder holds no file of a known kind"):
        read(base, [tmp_path / "empty"])


def test_names_with_tilde_brackets_and_globs(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a1.txt", "a2.txt", "a[12].txt"):
        (tmp_path / name).write_text(name)
    assert read(base, ["~/a1.txt"])[0] == ended(base, "a1.txt")
    assert read(base, [tmp_path / "a[12].txt"])[0] == ended(base, "a[12].txt")
    (tmp_path / "a[12].txt").unlink()
    assert read(base, [tmp_path / "a[12].txt"])[0] == ended(base, "a1.txt", "a2.txt")


def test_a_file_that_is_matched_twice_is_read_once(base, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    found, account = read(base, [tmp_path / "b.txt", tmp_path / "*.txt", tmp_path])
    assert found == ended(base, "b", "a")
    assert account.files == 2


def test_names_are_relative_to_the_working_folder_or_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "work").mkdir()
    tree = recipe_tree(tmp_path, tmp_path)
    tree["data"] = {"train": ["docs/*.txt"], "heldout": ["held.txt"]}
    (tmp_path / "recipes" / "r.yaml").write_text(json.dumps(tree))
    (tmp_path / "recipes" / "docs").mkdir()
    (tmp_path / "recipes" / "docs" / "a.txt").write_text("beside the recipe")
    (tmp_path / "recipes" / "held.txt").write_text("beside the recipe")
    (tmp_path / "work" / "held.txt").write_text("in the working folder")
    monkeypatch.chdir(tmp_path / "work")
    data = load_recipe("../recipes/r.yaml").data
    assert [Path(file).read_text() for file in matching_files(data.train[0])] == ["beside the recipe"]
    assert [Path(file).read_text() for file in matching_files(data.heldout[0])] == ["in the working folder"]


def test_a_missing_file_says_where_it_was_looked_for(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        read(base, ["docs/*.txt"])
    looked = f"in the working folder {tmp_path} or beside the recipe"
    assert str(caught.value) == f"data.train: no file matches 'docs/*.txt' {looked}; check the path"
    with pytest.raises(UserError, match=r"no file matches '/nowhere/a.txt'; check"):
        read(base, ["/nowhere/a.txt"])


def test_a_heldout_file_is_found_among_the_training_files_by_content(tmp_path):
    base = base_with(tiny_tokenizer(), tmp_path / "base")
    tree = recipe_tree(tmp_path, tmp_path)
    copy = tmp_path / "other-name.jsonl"
    copy.write_bytes((tmp_path / "heldout.jsonl").read_bytes())
    tree["data"]["train"] = [str(tmp_path / "train.jsonl"), str(copy)]
    with pytest.raises(
        UserError, match=rf"data.heldout: .*/heldout.jsonl is among the files of data.train too, as {copy}"
    ):
        rows_of(parse_recipe(tree, []), base)
    copy.write_bytes(copy.read_bytes()[:-1] + b" ")  # of the same size
    assert rows_of(parse_recipe(tree, []), base).account.files == 2


def test_zstandard(base, tmp_path, monkeypatch):
    for name in ("compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd....")
    with pytest.raises(
        UserError, match=r"a.jsonl.zst: .zst needs the package zstandard \(pip install zstandard\), or Python 3.14"
    ):
        read(base, [path])
    monkeypatch.undo()
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.ZstdCompressor().compress(LINES[:20].encode()) + zstandard.ZstdCompressor().compress(
        LINES[20:].encode()
    )
    path.write_bytes(packed)
    assert read(base, [path])[0] == ended(base, TEXT, "second"), "of several frames too"
    path.write_bytes(packed[:-5])
    with pytest.raises(UserError, match="is the file complete|not JSON"):
        read(base, [path])


# Special tokens


def test_what_looks_like_a_special_token_stays_text(base, tmp_path):
    text = "HTML has <s>struck</s> text, BERT has [SEP], and <eos> ends."
    (tmp_path / "a.txt").write_text(text)
    for _ in range(2):
        found, account = read(base, [tmp_path / "a.txt"])
        assert found == ended(base, text)
        assert account.look_alikes == 3
        assert account.notes("data.train") == [
            "data.train: 3 pieces of text look like special tokens and are kept as text"
        ]


def test_look_alikes_stay_text_where_the_model_itself_knows_them(tmp_path):
    """Unigram models have special tokens among their own pieces, and would give them for text."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -1.0) for letter in "abc <>/s")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(pieces, 0)), unk_token="<unk>", eos_token="</s>"
    )
    assert 1 in tokenizer("a</s>b", split_special_tokens=True)["input_ids"]
    base = base_with(tokenizer, tmp_path / "base")
    (tmp_path / "a.txt").write_text("a</s>b</s>")
    letters = {letter: number for number, (letter, _) in enumerate(pieces)}
    assert read(base, [tmp_path / "a.txt"])[0] == [[*(letters[each] for each in "a</s>b</s>"), 1]]


def test_documents_of_an_instruct_model_end_with_the_end_of_text_token(chat, tmp_path):
    end = chat.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert chat.tokenizer.eos_token == "<|im_end|>"
    assert end_of_text(chat.tokenizer) == end
    (tmp_path / "a.txt").write_text("a")
    assert read(chat, [tmp_path / "a.txt"])[0] == [[*ids_of("a"), end]]
    plain = byte_tokenizer("<|endoftext|>", eos_token="<|im_end|>")
    assert end_of_text(plain) == plain.eos_token_id, "without a chat template eos_token is what ends a text"
    only = byte_tokenizer(eos_token="<|im_end|>")
    only.chat_template = CHATML
    assert end_of_text(only) == only.eos_token_id


def test_messages_go_through_the_chat_template(chat, tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    start, stop, end = chat.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    expected = [
        start, *ids_of("user\nhi"), stop, *ids_of("\n"), start, *ids_of("assistant\nyes"), stop, *ids_of("\n"), end,
    ]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": turns, "id": 1}) + "\n" + json.dumps({"text": "plain", "messages": turns}))
    assert read(chat, [path])[0] == [expected, [*ids_of("plain"), end]]
    assert read(chat, [path], text_key="messages")[0] == [expected, expected]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [turns]}), tmp_path / "a.parquet")
    assert read(chat, [tmp_path / "a.parquet"])[0] == [expected]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (
            [{"role": "user", "content": "say <|im_end|>"}],
            "messages contain '<|im_end|>', which the chat template would turn",
        ),
        ([{"role": "tool", "content": "a"}], "messages: the chat template of the tokenizer fails: no tools"),
        ([{"from": "human", "value": "a"}], "messages must be a list of objects with role and content; found a list"),
        ([], "messages must be a list of objects"),
        ("hi", "messages must be a list of objects with role and content; found text"),
    ],
)
def test_messages_that_cannot_be_used(chat, tmp_path, messages, reason):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages}) + '\n{"text": "a"}\n')
    with pytest.raises(UserError) as caught:
        read(chat, [path])
    assert f"line 1: {reason}" in str(caught.value)
    assert read(chat, [path], skip_bad_rows=True)[1].skipped == 1


def test_a_tokenizer_without_end_of_text_is_told(tmp_path):
    base = base_with(byte_tokenizer("<s>"), tmp_path / "base")
    (tmp_path / "a.txt").write_text("a")
    found, account = read(base, [tmp_path / "a.txt"])
    assert found == [ids_of("a")]
    assert account.notes("data.train") == [
        "data.train: the tokenizer has no end-of-text token, so nothing marks where a document ends"
    ]


@pytest.mark.parametrize("named", [True, False], ids=["bos_token", "no bos_token"])
@pytest.mark.parametrize("packing", ["long", "concat"])
def test_a_prefix_of_several_tokens(tmp_path, packing, named):
    """As GLM's `[gMASK]<sop>`: it begins every segment, and neither predicts nor is predicted."""
    names = {"eos_token": "<end>"} | ({"bos_token": "<sop>"} if named else {})
    tokenizer = byte_tokenizer("[gMASK]", "<sop>", **names)
    mask, begin = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", mask), ("<sop>", begin)]
    )
    base = base_with(tokenizer, tmp_path / "base")
    assert base.prefix == (mask, begin)
    for name, size in (("train", 300), ("heldout", 200)):
        (tmp_path / f"{name}.txt").write_text("abcdefghij" * (size // 10))
    tree = recipe_tree(tmp_path, tmp_path)
    tree["data"] |= {
        "train": [str(tmp_path / "train.txt")],
        "heldout": [str(tmp_path / "heldout.txt")],
        "row_tokens": 128,
    }
    rows = rows_of(parse_recipe(tree, [f"data.packing={packing}"]), base).rows
    assert len(rows) == 2
    for row in rows:
        assert row.input_ids[:2].tolist() == [mask, begin]
        assert row.labels[0] == -100
        assert row.labels[1:-1].tolist() == row.input_ids[2:].tolist()
    for piece in rows[0].pieces(64, base.prefix):
        assert piece.input_ids[:2].tolist() == [mask, begin]
        assert piece.labels[0] == -100
        assert not {mask, begin} & {*piece.labels.tolist()}


def test_tokens_beyond_the_embedding_are_refused(base, tmp_path):
    tokenizer = byte_tokenizer(eos_token="<eos>")
    small = base_with(tokenizer, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    inside, beyond = (
        next(c for c in map(chr, range(33, 127)) if (LETTERS[ord(c)] >= 60) == high) for high in (False, True)
    )
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"vocab_size": 60}))
    (tmp_path / "a.txt").write_text(f"{inside}{beyond}")
    with pytest.raises(
        UserError,
        match=rf"a.txt: the tokenizer gives token {LETTERS[ord(beyond)]}, but the embedding of .* has 60 rows",
    ):
        read(small, [tmp_path / "a.txt"])


# Scale


def test_only_as_many_documents_are_tokenized_as_rows_need(base, tmp_path, monkeypatch):
    texts = [f"{number:03} " + "x" * 96 for number in range(500)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    seen: list[str] = []
    plain = Encoder._plain
    monkeypatch.setattr(
        Encoder, "_plain", lambda self, batch, special=False: seen.extend(batch) or plain(self, batch, special)
    )
    data = Data(train=[str(path)], heldout=["none"])
    found = read_documents(data, "data.train", data.train, base, Need(4000, 2000, seed=7))
    decoded = [base.tokenizer.decode(document[:-1]) for document in found]
    assert 40 <= len(decoded) <= 42
    assert decoded == sorted(decoded), "in the order of the file"
    assert {*decoded} < {*texts}
    assert max(int(text[:3]) for text in decoded) > 400, "and from all of it"
    assert len(seen) <= len(decoded) + 32, "beside those that the estimate takes"
    assert found.account.unread == 500 - len(decoded)
    again = read_documents(data, "data.train", data.train, base, Need(4000, 2000, seed=7))
    assert [each.tolist() for each in again] == [each.tolist() for each in found]
    other = read_documents(data, "data.train", data.train, base, Need(4000, 2000, seed=8))
    assert [each.tolist() for each in other] != [each.tolist() for each in found]


def test_long_documents_are_chosen_first_and_never_too_few(base, tmp_path):
    texts = ["s" * 50] * 400 + ["L" * 3000] * 3
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = Data(train=[str(path)], heldout=["none"])
    found = [document.tolist() for document in read_documents(data, "data.train", data.train, base, Need(9000, 2000))]
    assert sum(len(document) == 3001 for document in found) == 3
    assert len(found) == FEWEST


def test_ids_take_four_bytes_each(base, tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 5000)
    (tmp_path / "b.jsonl").write_text("\n".join(['{"text": "de"}'] * 3000))
    data = Data(train=[str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], heldout=["none"])
    for _ in range(2):
        found = read_documents(data, "data.train", data.train, base)
        assert sum(tokens.nbytes for tokens, _ in found.parts) == 4 * found.account.tokens == 4 * (15001 + 9000)
        assert all(np.shares_memory(document, found.parts[0][0]) for document in list(found)[:1])


def test_a_cache_of_another_format_or_tokenizer_is_not_used(base, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("abc")
    before = read(base, [tmp_path / "a.txt"])[0]
    other = byte_tokenizer("<s>", "[SEP]", eos_token="<other>")
    found = read(base_with(other, tmp_path / "base"), [tmp_path / "a.txt"])[0]
    assert found[0][:-1] == before[0][:-1]
    kept = documents._cache_path(tmp_path / "a.txt", Encoder(base, "text"), "all")
    assert kept.is_file()
    monkeypatch.setattr(documents, "CACHE_FORMAT", documents.CACHE_FORMAT + 1)
    assert documents._cache_path(tmp_path / "a.txt", Encoder(base, "text"), "all") != kept


def test_of_several_processes_one_tokenizes_and_the_others_read(base, tmp_path, monkeypatch):
    """Threads with locks of their own behave as processes do."""
    path = tmp_path / "a.txt"
    path.write_text("A text that nothing else reads, for two readers at once.")
    inside, other, calls = threading.Event(), threading.Event(), list[str]()
    encode, check = Encoder.encode, Encoder.check

    def slow(self, found, *rest):
        calls.append("encode")
        inside.set()
        if calls.count("encode") == 1:
            other.wait(1.0)  # the second reader does not come here; without the lock it does, and sets the event
        else:
            other.set()
        return encode(self, found, *rest)

    def checked(self, record):
        calls.append("check")
        return check(self, record)

    monkeypatch.setattr(Encoder, "encode", slow)
    monkeypatch.setattr(Encoder, "check", checked)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read, base, [path])
        assert inside.wait(60)
        second = pool.submit(read, base, [path])
    assert first.result() == second.result()
    assert (calls.count("encode"), calls.count("check")) == (1, 2)  # checked in the first pass and in the second


def test_a_cache_in_which_nothing_can_be_written(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "in-the-way").write_text("a file")
    monkeypatch.setenv("YARN_TUNE_CACHE", str(tmp_path / "in-the-way"))
    (tmp_path / "a.txt").write_text("Read all the same.")
    assert read(base, [tmp_path / "a.txt"])[0] == ended(base, "Read all the same.")
    assert "tokens are not kept" in capsys.readouterr().err
