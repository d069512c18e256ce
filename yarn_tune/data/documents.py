"""The documents that a recipe names, as token lists.

They come from .txt (a file is a document), .jsonl and .jsonl.gz (a line is a document), .parquet (a row is a document)
or a dataset on the hub. A field `input_ids` is taken as it is; text is tokenized once and kept under `$YARN_TUNE_CACHE`
(default `~/.cache/yarn_tune`), keyed by a hash of the file and the tokenizer.
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..recipe import HUB, Data, matching_files
from .packing import Tokens

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")


def tokenized(
    data: Data, place: str, names: list[str], tokenizer: PreTrainedTokenizerBase, enough: int
) -> Iterator[Tokens]:
    """Token lists of all documents, each closed by the end-of-text token; `enough` tokens of each hub dataset.

    Raises:
        UserError: if a file is missing or unreadable, or there is no text at all; the message begins with `place`.
    """
    found = 0
    for name in names:
        if name.startswith(HUB):
            before = found
            for record in _hub_records(place, name):
                tokens = _encode(record, f"{place}: {name}", data.text_key, tokenizer)
                found += len(tokens)
                if tokens:
                    yield tokens
                if found - before >= enough:
                    break
            continue
        paths = matching_files(name)
        if not paths:
            remedy = f"run `{data.prepare}` first" if data.prepare else "check the path"
            raise UserError(f"{place}: no file matches {name!r}; {remedy}")
        for path in paths:
            for tokens in _tokenized_file(Path(path), place, data.text_key, tokenizer):
                found += len(tokens)
                yield tokens
    if not found:
        raise UserError(f"{place}: no text in {', '.join(names)}; every document is empty")


def _tokenized_file(path: Path, place: str, text_key: str, tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """A file's documents as token lists, from the cache if they are there and whole."""
    cache = _cache_path(path, text_key, tokenizer)
    try:
        saved = load_file(cache)
        flat, ends = saved["tokens"].tolist(), saved["ends"].tolist()
        return [flat[start:end] for start, end in itertools.pairwise([0, *ends])]
    except (OSError, SafetensorError, KeyError):
        documents = [
            tokens
            for where, record in _records(path, place, text_key)
            if (tokens := _encode(record, where, text_key, tokenizer))
        ]
        _keep(documents, cache)
        return documents


def _keep(documents: list[Tokens], cache: Path) -> None:
    """Write a file's documents into the cache; where that cannot be, they are tokenized again the next time."""
    flat = [token for document in documents for token in document]
    ends = torch.tensor([len(document) for document in documents], dtype=torch.int64).cumsum(0)
    partial = cache.with_suffix(f".{os.getpid()}.partial")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file({"tokens": torch.tensor(flat, dtype=torch.int32), "ends": ends}, partial)
        partial.replace(cache)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        print(f"yarn-tune: tokens are not kept ({error}); YARN_TUNE_CACHE names another folder", file=sys.stderr)


def _cache_path(path: Path, text_key: str, tokenizer: PreTrainedTokenizerBase) -> Path:
    digest = hashlib.sha256()
    with open(path, "rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    signature = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    digest.update(json.dumps([signature, text_key, tokenizer.eos_token_id, path.suffix]).encode())
    home = os.environ.get("YARN_TUNE_CACHE") or Path.home() / ".cache" / "yarn_tune"
    return Path(home) / "tokens" / f"{digest.hexdigest()}.safetensors"


def _encode(record: dict[str, Any], where: str, text_key: str, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """One document as token ids with the end-of-text token behind it; [] for an empty one."""
    ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if record.get("input_ids") is not None:
        try:
            ids = [int(token) for token in record["input_ids"]]
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: input_ids must be a list of numbers ({error})") from error
        if ids and not (min(ids) >= 0 and max(ids) < len(tokenizer)):
            raise UserError(f"{where}: input_ids reach {max(ids)}, outside the tokenizer's {len(tokenizer)} tokens")
        return ids if not ids or ids[-1:] == ending else [*ids, *ending]
    text = record.get(text_key)
    if not isinstance(text, str):
        raise UserError(
            f"{where}: no text under {text_key!r} (found {', '.join(map(str, record)) or 'nothing'}); "
            "name the field in data.text_key"
        )
    if not text.strip():
        return []
    return [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *ending]


def _records(path: Path, place: str, text_key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, document) pairs of one file."""
    where = f"{place}: {path}"
    try:
        if path.name.endswith(".txt"):
            yield where, {text_key: path.read_text(encoding="utf-8")}
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _json_lines(path, where)
        elif path.name.endswith(".parquet"):
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=64):
                for record in batch.to_pylist():
                    yield where, record
        else:
            raise UserError(f"{where}: unknown kind of file; known: {', '.join(SUFFIXES)}")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not valid UTF-8 at byte {error.start}; convert it, for example with `iconv -t utf-8`"
        ) from error
    except (pyarrow.ArrowInvalid, OSError, EOFError, zlib.error) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{where}: cannot be read ({reason}); is the file complete?") from error


def _json_lines(path: Path, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}, line {number}: not JSON ({error.msg})") from error
            if not isinstance(record, dict):
                raise UserError(f'{where}, line {number}: a line must be an object such as {{"text": ...}}')
            yield f"{where}, line {number}", record


def _hub_records(place: str, name: str) -> Iterator[dict[str, Any]]:
    """Stream a dataset: `hub:org/name`, `hub:org/name:split` or `hub:org/name@config:split`."""
    dataset, _, split = name.removeprefix(HUB).partition(":")
    dataset, _, config = dataset.partition("@")
    try:
        stream = datasets.load_dataset(dataset, config or None, split=split or "train", streaming=True)
        yield from stream
    except Exception as error:  # the hub client has no common base class for what can go wrong
        raise UserError(f"{place}: {name!r} could not be read from the hub: {error}") from error
