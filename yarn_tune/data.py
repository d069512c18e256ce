"""From the documents a recipe names to rows for training and excerpts for measuring.

Documents come from .txt (a file is a document), .jsonl and .jsonl.gz (a line is a document), .parquet (a row is
a document) or a dataset on the hub. A field `input_ids` is taken as it is; text is tokenized once and kept under
`$YARN_TUNE_CACHE` (default `~/.cache/yarn_tune`), keyed by a hash of the file and the tokenizer.
"""

import contextlib
import glob
import gzip
import hashlib
import itertools
import json
import os
import random
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import UserError
from .models import bos_of
from .packing import Packed, Tokens, pack_concat, pack_long
from .positions import Coverage, Placed, coverage, place_contiguous, place_skip
from .sections import Recipe

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
HUB = "hub:"


@dataclass(frozen=True)
class RowSet:
    """The rows of a run, in a fixed order, with an account of them."""

    rows: list[Placed]
    packed: Packed | None
    """None for skip rows, which are drawn rather than packed."""
    available: int
    """Rows the documents would have given."""
    bos: int | None = None
    """What every row begins with, in place of its first token, where the tokenizer puts a token before a text."""

    def batch(self, step: int, batch_rows: int, seed: int) -> list[Placed]:
        """The rows of one step. A function of its arguments alone, so that a resumed run reads on exactly.

        Rows are shuffled anew for every pass over them.
        """
        chosen = []
        for slot in range(step * batch_rows, (step + 1) * batch_rows):
            epoch, place = divmod(slot, len(self.rows))
            order = list(range(len(self.rows)))
            random.Random(f"{seed}/{epoch}").shuffle(order)
            chosen.append(self.rows[order[place]])
        return chosen

    def coverage(self, window: int, lengths: list[int] | None = None) -> Coverage:
        """Which relative distances these rows train: whole, or cut to each of `lengths` (`data.lengths`)."""
        return coverage((piece for n in lengths or [window] for row in self.rows for piece in row.pieces(n)), window)


def build_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RowSet:
    """Tokenize, pack and place the training documents.

    Raises:
        UserError: if files are missing or unreadable, hold too little text for one row, or are held out too.
    """
    _check_apart(recipe)
    row_tokens, wanted = recipe.row_tokens(), recipe.rows()
    enough, bos = 2 * wanted * row_tokens, bos_of(tokenizer)
    documents = list(_tokenized(recipe, "data.train", recipe.data.train, tokenizer, enough))
    if recipe.data.positions == "skip":
        try:
            rows = place_skip(documents, recipe.rope.window, row_tokens, recipe.data.spans, wanted, recipe.train.seed)
        except ValueError as error:
            raise UserError(f"data.positions: {error}; use longer documents or a smaller data.row_tokens") from error
        return RowSet([row.begun(bos) for row in rows], None, wanted, bos)
    filler = tokenizer.eos_token_id or 0
    pack = pack_long if recipe.data.packing == "long" else pack_concat
    packed = pack(documents, row_tokens, filler)
    usable = [row for row in packed.rows if row.padding == 0]
    if packed.tokens < row_tokens:
        raise UserError(
            f"data.train: {packed.tokens} tokens in {packed.documents} documents do not fill one row of "
            f"{row_tokens}; add documents or lower data.row_tokens"
        )
    rng = random.Random(recipe.train.seed)
    whole = packed.whole_rows
    # Rows out of one document are the better teachers of distance: they come first when not all are needed.
    order = [*rng.sample(range(whole), whole), *rng.sample(range(whole, len(usable)), len(usable) - whole)]
    return RowSet([place_contiguous(usable[i]).begun(bos) for i in order[:wanted]], packed, len(usable), bos)


HELDOUT_FILLER = 2_000_000
"""Tokens of a streamed dataset that are enough to hide needles in."""


def heldout_excerpts(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, length: int, count: int
) -> list[tuple[str, Tensor]]:
    """Up to `count` excerpts of `length` tokens, `[length]` each, from the held-out documents in turn.

    The first excerpts are the documents' beginnings, the next ones what follows. Each comes with a label, and begins as
    the tokenizer lets a text begin.

    Raises:
        UserError: if no held-out document is long enough.
    """
    enough, bos = 4 * count * length, bos_of(tokenizer)
    documents = list(_tokenized(recipe, "data.heldout", recipe.data.heldout, tokenizer, enough))
    excerpts: list[tuple[str, Tensor]] = []
    longest = max((len(document) for document in documents), default=0)
    for turn in range(longest // length):
        for number, document in enumerate(documents):
            span = document[turn * length : (turn + 1) * length]
            if len(span) == length and len(excerpts) < count:
                ids = span if bos is None else [bos, *span[1:]]
                excerpts.append((f"document {number + 1}, part {turn + 1}", torch.tensor(ids)))
    if not excerpts:
        raise UserError(
            f"data.heldout: the longest of {len(documents)} documents has {longest} tokens, fewer than the "
            f"{length} to be measured; add longer documents or lower eval.lengths"
        )
    return excerpts


def check_heldout(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse held-out files that `compare` could not measure on, before anything is learned.

    Datasets on the hub are not read for it, since no cache keeps them.

    Raises:
        UserError: if files are missing or unreadable, or no document is as long as the longest length measured.
    """
    if not any(name.startswith(HUB) for name in recipe.data.heldout):
        heldout_excerpts(recipe, tokenizer, max(recipe.eval.lengths or [recipe.rope.window]), 1)


def heldout_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All held-out documents, one after another, without special tokens: prose to hide needles in."""
    documents = _tokenized(recipe, "data.heldout", recipe.data.heldout, tokenizer, HELDOUT_FILLER)
    special = set(tokenizer.all_special_ids)
    return [token for document in documents for token in document if token not in special]


def _check_apart(recipe: Recipe) -> None:
    """Refuse files that are trained on and held out, under whatever names."""
    train, heldout = (
        {os.path.realpath(path) for name in names for path in _matches(name)}
        for names in (recipe.data.train, recipe.data.heldout)
    )
    if both := sorted(train & heldout):
        raise UserError(
            f"data.heldout: {', '.join(both)} is among the files of data.train too; measuring on training documents "
            "says nothing: name other documents"
        )


def missing_files(recipe: Recipe) -> list[str]:
    """Names under data.train and data.heldout that match no file."""
    names = [*recipe.data.train, *recipe.data.heldout]
    return [name for name in names if not name.startswith(HUB) and not _matches(name)]


def _matches(pattern: str) -> list[str]:
    return sorted(path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path))


def _tokenized(
    recipe: Recipe, place: str, names: list[str], tokenizer: PreTrainedTokenizerBase, enough: int
) -> Iterator[Tokens]:
    """Token lists of all documents, each closed by the end-of-text token; `enough` tokens of each hub dataset."""
    found = 0
    for name in names:
        if name.startswith(HUB):
            before = found
            for record in _hub_records(place, name):
                tokens = _encode(record, f"{place}: {name}", recipe.data.text_key, tokenizer)
                found += len(tokens)
                if tokens:
                    yield tokens
                if found - before >= enough:
                    break
            continue
        paths = _matches(name)
        if not paths:
            remedy = f"run `{recipe.data.prepare}` first" if recipe.data.prepare else "check the path"
            raise UserError(f"{place}: no file matches {name!r}; {remedy}")
        for path in paths:
            for tokens in _tokenized_file(Path(path), place, recipe.data.text_key, tokenizer):
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
