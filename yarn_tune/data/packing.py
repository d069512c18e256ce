"""Pack documents into rows of equal length, and count both. Every token is used exactly once.

A row is `row_tokens` ids, cut into *segments*: runs of tokens that attend to each other. The module `positions` assigns
positions. Time is linear in documents and tokens; a row that is a span of one document is a view of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
"""Token ids, `[n]`, in 4 bytes each."""


@dataclass(frozen=True)
class Account:
    """Counts of the documents that a recipe names."""

    files: int = 0
    documents: int = 0
    """Documents that were tokenized."""
    tokens: int = 0
    longest: int = 0
    """Tokens of the longest document that was tokenized."""
    unread: int = 0
    """Documents that the rows do not need."""
    empty: int = 0
    skipped: int = 0
    """Rows that cannot be used."""
    reasons: tuple[str, ...] = ()
    """Reasons for the first skipped rows."""
    look_alikes: int = 0
    """Pieces of text that look like a special token and stay text."""
    separated: bool = True
    """Whether the tokenizer has an end-of-text token to append to each document."""

    def text(self) -> str:
        """Describe the number and the length of the documents."""
        mean = self.tokens // max(1, self.documents)
        unread = f"; {self.unread:,} more are not needed" if self.unread else ""
        return (
            f"{self.documents:,} documents in {self.files} files, {self.tokens:,} tokens (mean {mean:,}, longest "
            f"{self.longest:,}){unread}"
        )

    def notes(self, place: str) -> list[str]:
        """Describe rows and documents that are skipped or handled in an unusual way."""
        found = []
        if self.skipped:
            found.append(f"{place}: {self.skipped:,} rows are skipped (data.skip_bad_rows): {'; '.join(self.reasons)}")
        if self.empty:
            found.append(f"{place}: {self.empty:,} documents are empty")
        if self.look_alikes:
            found.append(f"{place}: {self.look_alikes:,} pieces of text look like special tokens and are kept as text")
        if not self.separated:
            found.append(f"{place}: the tokenizer has no end-of-text token, so nothing marks where a document ends")
        return found


@dataclass(frozen=True, eq=False)
class Row:
    """One row. `segments` are lengths that add up to the row's; the last `padding` tokens are filler."""

    tokens: Tokens
    segments: tuple[int, ...]
    padding: int = 0


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows, and counts of the documents and tokens in them."""

    rows: list[Row]
    documents: int
    tokens: int
    whole_rows: int
    """Rows that are one span of one document; the first `whole_rows` of `rows`."""

    @property
    def padding(self) -> int:
        """Filler tokens over all rows."""
        return sum(row.padding for row in self.rows)


class _Shared:
    """Rows that are filled piece by piece."""

    def __init__(self, row_tokens: int) -> None:
        self.row_tokens, self.rows = row_tokens, list[Row]()
        self._pieces: list[Tokens] = []
        self._filled = 0

    @property
    def room(self) -> int:
        """Free tokens of the current row."""
        return self.row_tokens - self._filled

    def add(self, piece: Tokens) -> None:
        """Append at most `room` tokens to the current row."""
        self._pieces.append(piece)
        self._filled += len(piece)
        if self._filled == self.row_tokens:
            self._close(self._pieces, 0)

    def fill(self, filler: int) -> None:
        """Pad the last row with `filler` if it is short."""
        if self._filled:
            self._close([*self._pieces, np.full(self.room, filler, np.int32)], self.room)

    def _close(self, pieces: list[Tokens], padding: int) -> None:
        tokens = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        self.rows.append(Row(tokens, tuple(map(len, pieces)), padding))
        self._pieces, self._filled = [], 0


def pack_concat(documents: Iterable[Tokens], row_tokens: int, filler: int = 0) -> Packed:
    """Concatenate documents; each piece of a document in a row is a segment of its own."""
    shared = _Shared(row_tokens)
    count = total = 0
    for document in documents:
        count += 1
        total += len(document)
        at = 0
        while at < len(document):
            piece = document[at : at + shared.room]
            at += len(piece)
            shared.add(piece)
    shared.fill(filler)
    whole = [row for row in shared.rows if len(row.segments) == 1]
    mixed = [row for row in shared.rows if len(row.segments) > 1]
    return Packed([*whole, *mixed], count, total, len(whole))


def pack_long(documents: Iterable[Tokens], row_tokens: int, filler: int = 0) -> Packed:
    """Take spans of single documents where they are long enough, and concatenate the remainders.

    A joined row is one segment: its positions continue across documents, so that far positions are trained even where
    no document reaches them (the end-of-text token marks the end of a document).
    """
    whole: list[Row] = []
    shared = _Shared(row_tokens)
    count = total = 0
    for document in documents:
        count += 1
        total += len(document)
        full = len(document) // row_tokens * row_tokens
        whole += [Row(document[at : at + row_tokens], (row_tokens,)) for at in range(0, full, row_tokens)]
        at = full
        while at < len(document):
            piece = document[at : at + shared.room]
            at += len(piece)
            shared.add(piece)
    shared.fill(filler)
    joined = [
        Row(row.tokens, (row_tokens - row.padding, row.padding) if row.padding else (row_tokens,), row.padding)
        for row in shared.rows
    ]
    return Packed([*whole, *joined], count, total, len(whole))
