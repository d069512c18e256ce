"""The documents that a recipe names, as token ids of 4 bytes each.

Files are read twice. The first pass checks every record and notes its size; if there is more text than the rows need, a
seeded choice of documents is made from the sizes. The second pass tokenizes the chosen documents. One process of a
machine makes both results and keeps them under `$YARN_TUNE_CACHE` (default `~/.cache/yarn_tune`), keyed by a hash of
the file and the tokenizer; the others read them. Datasets on the hub are streamed until there is enough, and not kept.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from ..errors import UserError
from ..files import read_tensors_and_metadata, save_tensors, write_atomically
from ..models import BaseModel, cache_folder, kept_digest
from ..recipe import HUB, Data, kind_of, matching_files
from .packing import Account, Tokens
from .readers import Record, hub_records, read_records
from .tokenization import BadRow, Document, Encoder

CACHE_FORMAT = 2
FEWEST = 32
"""Fewest documents to tokenize, if there are that many, so that a few rows come from several documents."""
REASONS = 3
"""Most reasons for skipped rows in a report."""


@dataclass(frozen=True)
class Need:
    """How much text to tokenize, if the documents hold more than the rows of a run need."""

    tokens: int
    """Fewest tokens to tokenize."""
    row_tokens: int
    """Documents with at least this many tokens are chosen first."""
    seed: int = 0


@dataclass(frozen=True)
class Documents:
    """Token ids of many documents; iterating gives each as a view, without a copy."""

    parts: list[tuple[Tokens, NDArray[np.int64]]]
    """For each file: all ids, and the end index of each document in them."""
    account: Account

    def __iter__(self) -> Iterator[Tokens]:
        for tokens, ends in self.parts:
            for start, end in itertools.pairwise([0, *ends.tolist()]):
                yield tokens[start:end]


@dataclass(frozen=True)
class Survey:
    """The first pass over a file: sizes of its usable documents."""

    characters: NDArray[np.int64]
    given: NDArray[np.int64]
    """Tokens of documents that come as token ids; 0 for text."""
    skipped: int = 0
    reasons: tuple[str, ...] = ()
    look_alikes: int = 0


def read_documents(data: Data, place: str, names: list[str], base: BaseModel, need: Need | None = None) -> Documents:
    """Tokenize the documents under some names, each followed by the end-of-text token.

    Args:
        data: section of the recipe, with the settings for reading records.
        place: key of the recipe (`data.train`), with which every message begins.
        names: files, folders, globs and datasets on the hub.
        base: the model whose tokenizer is used.
        need: how much text the rows need; None reads all files. Datasets on the hub are read up to `need.tokens` each.

    Raises:
        UserError: if a file is missing or unreadable, a row cannot be used, or there is no text at all.
    """
    encoder = Encoder(base, data.text_key)
    paths = _files(data, place, names)
    surveys = [_survey(path, place, encoder, data.skip_bad_rows) for path in paths]
    target = need
    while True:
        chosen = _choose(paths, surveys, place, encoder, target)
        parts = [_tokens(path, place, encoder, mask) for path, mask in zip(paths, chosen, strict=True)]
        total = sum(len(tokens) for tokens, _ in parts)
        if target is None or need is None or 2 * total >= need.tokens or all(mask is None for mask in chosen):
            break
        target = replace(target, tokens=2 * target.tokens)  # the estimate of tokens per character was too high
    account = Account(
        files=len(paths),
        unread=sum(int((~mask).sum()) for mask in chosen if mask is not None),
        empty=sum(int(((each.characters == 0) & (each.given == 0)).sum()) for each in surveys),
        skipped=sum(each.skipped for each in surveys),
        reasons=tuple(itertools.chain.from_iterable(each.reasons for each in surveys))[:REASONS],
        look_alikes=sum(each.look_alikes for each in surveys),
        separated=bool(encoder.separator),
    )
    for name in names:
        if name.startswith(HUB):
            part, account = _streamed(data, place, name, encoder, need, account)
            parts.append(part)
    lengths = [np.diff(ends, prepend=0) for _, ends in parts]
    account = replace(
        account,
        documents=sum(len(each) for each in lengths),
        tokens=sum(int(each.sum()) for each in lengths),
        longest=max((int(each.max()) for each in lengths if len(each)), default=0),
    )
    if not account.tokens:
        raise UserError(f"{place}: no text in {', '.join(names)}; every document is empty")
    return Documents(parts, account)


def _files(data: Data, place: str, names: list[str]) -> list[Path]:
    """The files of all names, in order; a file that is matched twice is read once."""
    found: dict[str, Path] = {}
    for name in names:
        if name.startswith(HUB):
            continue
        paths = matching_files(name)
        if not paths:
            folder = Path(os.path.expanduser(name))
            remedy = f"run `{data.prepare}` first" if data.prepare else "check the path"
            where = "" if folder.is_absolute() else f" in the working folder {Path.cwd()} or beside the recipe"
            what = "the folder holds no file of a known kind" if folder.is_dir() else f"no file matches {name!r}{where}"
            raise UserError(f"{place}: {what}; {remedy}")
        for path in paths:
            found.setdefault(os.path.realpath(path), Path(path))
    return list(found.values())


def _checked(records: Iterable[Record], encoder: Encoder, skip: bool) -> Iterator[Document | str]:
    """Yield a document per row, or the reason why the row is skipped.

    Raises:
        UserError: for a row that cannot be used, unless such rows are skipped.
    """
    for record in records:
        try:
            yield encoder.check(record)
        except BadRow as error:
            if not skip:
                raise UserError(f"{record.where}: {error} (data.skip_bad_rows: true skips such rows)") from error
            yield f"{record.where}: {error}"


def _survey(path: Path, place: str, encoder: Encoder, skip: bool) -> Survey:
    """The first pass over a file, cached; a cached result with bad rows is used only if bad rows are skipped."""
    cache = _cache_path(path, encoder, "survey")
    if (known := _known_survey(cache, skip)) is not None:
        return known
    with _alone(cache):
        return _known_survey(cache, skip) or _new_survey(path, place, encoder, skip, cache)


def _known_survey(cache: Path, skip: bool) -> Survey | None:
    arrays, facts = _load(cache)
    if facts is None or (facts["skipped"] and not skip):
        return None
    reasons, look_alikes = tuple(facts["reasons"]), facts["look_alikes"]
    return Survey(arrays["characters"], arrays["given"], facts["skipped"], reasons, look_alikes)


def _new_survey(path: Path, place: str, encoder: Encoder, skip: bool, cache: Path) -> Survey:
    characters, given, skipped, look_alikes = array("q"), array("q"), 0, 0
    first: list[str] = []
    for found in _checked(read_records(path, place, encoder.columns), encoder, skip):
        if isinstance(found, str):
            skipped += 1
            if len(first) < REASONS:
                first.append(found.removeprefix(f"{place}: "))
            continue
        characters.append(len(found.text) if found.text.strip() else 0)
        given.append(0 if found.ids is None else len(found.ids))
        look_alikes += 0 if found.chat else encoder.look_alikes(found.text)
    arrays = {"characters": np.array(characters, np.int64), "given": np.array(given, np.int64)}
    facts = {"skipped": skipped, "reasons": first, "look_alikes": look_alikes}
    _keep(cache, arrays, facts)
    return Survey(arrays["characters"], arrays["given"], skipped, tuple(first), look_alikes)


def _choose(
    paths: list[Path], surveys: list[Survey], place: str, encoder: Encoder, need: Need | None
) -> list[NDArray[np.bool_] | None]:
    """For each file, which documents to tokenize; None for all.

    Long documents come first, since they give rows within one document; otherwise the order is random, by the seed.
    """
    everything: list[NDArray[np.bool_] | None] = [None] * len(surveys)
    characters = sum(int(each.characters.sum()) for each in surveys)
    if need is None or characters + sum(int(each.given.sum()) for each in surveys) <= need.tokens:
        return everything
    rate = _tokens_per_character(paths[0], place, encoder) if characters else 0.0
    sizes = np.concatenate([each.given + np.ceil(each.characters * rate) for each in surveys])
    if sizes.sum() <= need.tokens:
        return everything
    order = np.random.RandomState(need.seed).permutation(len(sizes))
    order = order[np.argsort(sizes[order] < need.row_tokens, kind="stable")]
    count = max(FEWEST, int(np.searchsorted(sizes[order].cumsum(), need.tokens)) + 1)
    mask = np.zeros(len(sizes), bool)
    mask[order[:count]] = True
    masks = np.split(mask, np.cumsum([len(each.given) for each in surveys])[:-1])
    return [None if part.all() else part for part in masks]


def _tokens_per_character(path: Path, place: str, encoder: Encoder) -> float:
    """Estimate tokens per character from the beginnings of the first documents."""
    records = itertools.islice(read_records(path, place, encoder.columns), 32)
    texts = [found for found in _checked(records, encoder, skip=True) if isinstance(found, Document)]
    beginnings = [replace(each, text=each.text[:20_000]) for each in texts if each.text.strip()]
    characters = sum(len(each.text) for each in beginnings)
    return sum(map(len, encoder.encode(beginnings))) / characters if characters else 1.0


def _tokens(
    path: Path, place: str, encoder: Encoder, mask: NDArray[np.bool_] | None
) -> tuple[Tokens, NDArray[np.int64]]:
    """Token ids of the chosen documents of a file, cached."""
    chosen = "all" if mask is None else hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()
    cache = _cache_path(path, encoder, chosen)
    arrays, facts = _load(cache)
    if facts is None:
        with _alone(cache):
            arrays, facts = _load(cache)
            if facts is None:
                found = _checked(read_records(path, place, encoder.columns), encoder, skip=True)
                documents = (each for each in found if isinstance(each, Document))
                arrays = _joined(encoder.encode(documents if mask is None else itertools.compress(documents, mask)))
                _keep(cache, arrays, {})
    return arrays["tokens"], arrays["ends"]


def _joined(documents: Iterable[Tokens]) -> dict[str, NDArray[Any]]:
    """Join documents in one array, without the empty ones."""
    chunks, ends, buffer, total = [np.zeros(0, np.int32)], array("q"), list[Tokens](), 0
    for document in documents:
        if len(document):
            buffer.append(document)
            total += len(document)
            ends.append(total)
        if len(buffer) == 4096:
            chunks.append(np.concatenate(buffer))
            buffer = []
    return {"tokens": np.concatenate([*chunks, *buffer]), "ends": np.array(ends, np.int64)}


def _streamed(
    data: Data, place: str, name: str, encoder: Encoder, need: Need | None, account: Account
) -> tuple[tuple[Tokens, NDArray[np.int64]], Account]:
    """Read documents of a dataset on the hub until there are enough; return them and the account with them."""
    documents, total = list[Tokens](), 0
    for found in _checked(hub_records(place, name, encoder.columns), encoder, data.skip_bad_rows):
        if isinstance(found, str):
            reasons = (*account.reasons, found.removeprefix(f"{place}: "))[:REASONS]
            account = replace(account, skipped=account.skipped + 1, reasons=reasons)
            continue
        documents += encoder.encode([found])
        total += len(documents[-1])
        if need is not None and total >= need.tokens:
            break
    arrays = _joined(documents)
    return (arrays["tokens"], arrays["ends"]), replace(account, files=account.files + 1)


def _cache_path(path: Path, encoder: Encoder, what: str) -> Path:
    """The path at which a result for a file's content is cached."""
    state = path.stat()
    digest = _digest(path, state.st_size, state.st_mtime_ns)
    facts = [CACHE_FORMAT, digest, kind_of(str(path)), what, encoder.signature]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return cache_folder() / "tokens" / f"{key}.safetensors"


@functools.lru_cache(maxsize=100_000)
def _digest(path: Path, size: int, modified: int) -> str:
    """SHA-256 of a file's content, computed once for each state of the file, also by several commands."""
    return kept_digest(path)


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Hold a lock while a result is computed, so that other processes wait for it; none if no lock can be written."""
    lock = FileLock(cache.parent / f"{cache.name[:2]}.lock")
    with contextlib.suppress(OSError, NotImplementedError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _load(cache: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any] | None]:
    """Arrays and facts of a cached result; None in place of facts if it is missing or damaged."""
    try:
        tensors, metadata = read_tensors_and_metadata(cache, required=True)
        return {name: tensor.numpy() for name, tensor in tensors.items()}, json.loads(metadata["facts"])
    except (UserError, KeyError, ValueError):
        return {}, None


def _keep(cache: Path, arrays: dict[str, NDArray[Any]], facts: dict[str, Any]) -> None:
    """Cache a result; if it cannot be written, it is computed again the next time."""
    if not all(map(len, arrays.values())):
        return
    tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
    try:
        write_atomically(cache, save_tensors(tensors, {"facts": json.dumps(facts)}))
    except UserError as error:
        print(f"yarn-tune: tokens are not kept ({error}); YARN_TUNE_CACHE names another folder", file=sys.stderr)
