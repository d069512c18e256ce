"""Make training and validation rows from the documents that a recipe names."""

import itertools
import os
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import UserError
from ..files import file_digest
from ..models import BaseModel
from ..recipe import HUB, Data, kind_of, matching_files
from .documents import Documents, Need, read_documents
from .packing import Account, Packed, Tokens, pack_concat, pack_long
from .positions import Coverage, Placed, count_distances, place_contiguous
from .readers import read_records


@dataclass(frozen=True)
class RowRequest:
    """How many rows to make, of how many tokens, and the seed of their order."""

    row_tokens: int
    rows: int
    seed: int


@dataclass(frozen=True)
class RowSet:
    """The rows of a run, in a fixed order, with an account of them."""

    rows: list[Placed]
    packed: Packed
    available: int
    """Number of rows that the documents fill."""
    prefix: tuple[int, ...] = ()
    """Tokens that replace the first tokens of every row: those that the tokenizer prepends to a text."""
    account: Account = field(default_factory=Account)
    """Counts of the documents."""

    def batch(self, step: int, batch_size: int, seed: int) -> list[Placed]:
        """The rows of one step. They depend on the arguments only, so that a resumed run reads the same rows.

        Rows are shuffled again for every pass over them.
        """
        chosen = []
        for slot in range(step * batch_size, (step + 1) * batch_size):
            epoch, place = divmod(slot, len(self.rows))
            order = list(range(len(self.rows)))
            random.Random(f"{seed}/{epoch}").shuffle(order)
            chosen.append(self.rows[order[place]])
        return chosen

    def coverage(self, window: int, lengths: list[int] | None = None) -> Coverage:
        """Which relative distances these rows train: whole, or cut to each of `lengths` (`data.lengths`)."""
        return count_distances(
            (piece for n in lengths or [window] for row in self.rows for piece in row.pieces(n)), window
        )


def build_rows(data: Data, base: BaseModel, request: RowRequest) -> RowSet:
    """Tokenize, pack and place the training documents.

    Raises:
        UserError: if files are missing or unreadable, hold too little text for one row, or are also held out.
    """
    _check_apart(data)
    documents = _read(data, "data.train", data.train, base, request)
    return _rows(list(documents), documents.account, data, base, request)


def build_rows_apart(data: Data, base: BaseModel, request: RowRequest, count: int) -> tuple[RowSet, RowSet]:
    """Training rows, and up to `count` validation rows of documents that no training row has a token of.

    The validation documents are `data.validation`; where it is null, up to a quarter of the training documents, chosen
    by the seed among the longest ones, are held back.

    Raises:
        UserError: as `build_rows`; or if there is too little text for one validation row, only one document, or a
            document of `data.validation` among those that are trained on.
    """
    _check_apart(data)
    own = replace(request, rows=count)
    if data.validation is not None:
        documents = _read(data, "data.validation", data.validation, base, own)
        kept = _rows(list(documents), documents.account, data, base, own, "data.validation")
        trained = _read(data, "data.train", data.train, base, request)
        _check_documents_apart(trained, documents)
        return _rows(list(trained), trained.account, data, base, request), kept
    documents = _read(data, "data.train", data.train, base, replace(request, rows=request.rows + count))
    train, held_back = _hold_back(list(documents), own)
    try:
        rows = _rows(train, documents.account, data, base, request)
        return rows, _rows(held_back, Account(), data, base, own, "data.validation")
    except UserError as error:
        raise UserError(
            f"{error}. train.decide holds back {len(held_back)} of the {len(train) + len(held_back)} documents of "
            "data.train; name others in data.validation, or set train.decide to false"
        ) from error


def _read(data: Data, key: str, names: list[str], base: BaseModel, request: RowRequest) -> Documents:
    """Read the documents under a key of the recipe, up to twice the text that the rows need."""
    need = Need(2 * request.rows * request.row_tokens, request.row_tokens, request.seed)
    return read_documents(data, key, names, base, need)


def _hold_back(documents: list[Tokens], request: RowRequest) -> tuple[list[Tokens], list[Tokens]]:
    """The documents to train on, and those held back to measure on."""
    if len(documents) < 2:
        raise UserError(
            "data.validation: data.train holds one document only, so none can be held back for train.decide; name "
            "validation documents, or set train.decide to false"
        )
    order = list(range(len(documents)))
    random.Random(f"validation/{request.seed}").shuffle(order)
    order.sort(key=lambda index: len(documents[index]) < request.row_tokens)  # those that fill a row first
    chosen: set[int] = set()
    for index in order[: max(1, len(documents) // 4)]:
        if sum(len(documents[i]) for i in chosen) < request.rows * request.row_tokens:
            chosen.add(index)
    return [d for i, d in enumerate(documents) if i not in chosen], [documents[i] for i in sorted(chosen)]


def _rows(
    documents: list[Tokens], account: Account, data: Data, base: BaseModel, request: RowRequest, key: str = "data.train"
) -> RowSet:
    """Pack and place documents; `key` begins the message if they do not fill a row."""
    filler = base.tokenizer.eos_token_id or 0
    pack = pack_long if data.packing == "long" else pack_concat
    packed = pack(documents, request.row_tokens, filler)
    usable = [row for row in packed.rows if row.padding == 0]
    if packed.tokens < request.row_tokens:
        raise UserError(
            f"{key}: {packed.tokens} tokens in {packed.documents} documents do not fill one row of "
            f"{request.row_tokens}; add documents or lower data.row_tokens"
        )
    rng = random.Random(request.seed)
    whole = packed.whole_rows
    # Rows from a single document train real long distances, so they come first if not all rows are needed.
    order = [*rng.sample(range(whole), whole), *rng.sample(range(whole, len(usable)), len(usable) - whole)]
    rows = [place_contiguous(usable[i]).with_prefix(base.prefix) for i in order[: request.rows]]
    return RowSet(rows, packed, len(usable), base.prefix, account)


def has_several(names: list[str]) -> bool:
    """Whether training documents are more than one, so that `train.decide` can hold some back.

    Datasets on the hub, files that do not exist yet and unreadable files count as several; at most two records are
    read.
    """
    paths = sorted(_real_paths(names))
    if len(paths) != 1 or any(name.startswith(HUB) for name in names):
        return True
    found = kind_of(paths[0])
    if found is not None and found[0] in (".txt", ".md"):
        return False
    columns = ("text", "input_ids", "messages")
    try:
        records = read_records(Path(paths[0]), "data.train", columns)
        return len(list(itertools.islice((each for each in records if any(each.values.values())), 2))) > 1
    except UserError:  # for the plan to explain
        return True


def _check_apart(data: Data) -> None:
    """Refuse files that are under two keys, also under another name: trained on, and held out or for validation.

    `data.validation` chooses what is kept, so held-out files must not be among its files either.
    """
    train, held = {"data.train": data.train}, data.heldout_files()
    own = {"data.validation": data.validation or []}
    for keys, others in ((held | own, train), (own, held)):
        for key, names in keys.items():
            for other, found in others.items():
                _check_files_apart(key, _real_paths(names), other, _real_paths(found))


def _check_files_apart(key: str, paths: set[str], other: str, others: set[str]) -> None:
    """Refuse files of one key whose content is that of a file of another key."""
    sizes = {os.path.getsize(path) for path in paths} - {0}
    digests = {file_digest(Path(path)): path for path in sorted(others) if os.path.getsize(path) in sizes}
    for path in sorted(paths):
        same = digests.get(file_digest(Path(path))) if digests else None
        if same is not None:
            name = "" if same == path else f", as {same}"
            raise UserError(
                f"{key}: {path} is among the files of {other} too{name}; measurements on documents that were trained "
                "on, or that chose what is kept, are not valid; name other documents"
            )


COUNTED = 64
"""Fewest tokens of a document that must not be in training and validation; shorter texts repeat by chance."""


def _check_documents_apart(train: Documents, own: Documents) -> None:
    """Refuse validation documents that are trained on, also where the files differ."""
    known = {document.tobytes() for document in train if len(document) >= COUNTED}
    both = sum(document.tobytes() in known for document in own)
    if both:
        raise UserError(
            f"data.validation: {both} of {own.account.documents} documents are documents of data.train too; "
            "train.decide cannot measure on documents that were trained on; name others"
        )


def _real_paths(names: list[str]) -> set[str]:
    return {os.path.realpath(path) for name in names for path in matching_files(name)}
