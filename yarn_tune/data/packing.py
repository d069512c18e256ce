"""Token lists in, rows of equal length out. No token is lost, none is used twice.

A row is `row_tokens` ids, cut into *segments*: runs of tokens that may see each other. What the row's positions
are is decided in `positions`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

Tokens = list[int]


@dataclass(frozen=True)
class Row:
    """One row. `segments` are lengths that add up to the row's; the last `padding` tokens are filler."""

    tokens: Tokens
    segments: list[int]
    padding: int = 0


@dataclass(frozen=True)
class Packed:
    """Rows, and an account of where the tokens went."""

    rows: list[Row]
    documents: int
    tokens: int
    whole_rows: int
    """Rows that are one span of one document; the first `whole_rows` of `rows`."""

    @property
    def padding(self) -> int:
        """Filler tokens over all rows."""
        return sum(row.padding for row in self.rows)


def pack_concat(documents: Iterable[Tokens], row_tokens: int, filler: int = 0) -> Packed:
    """Documents one after another; each piece of a document in a row is a segment of its own."""
    rows: list[Row] = []
    tokens: Tokens = []
    segments: list[int] = []
    count = total = 0
    for document in documents:
        count += 1
        total += len(document)
        at = 0
        while at < len(document):
            piece = document[at : at + row_tokens - len(tokens)]
            at += len(piece)
            tokens = tokens + piece
            segments = [*segments, len(piece)]
            if len(tokens) == row_tokens:
                rows.append(Row(tokens, segments))
                tokens, segments = [], []
    if tokens:
        rows.append(_filled(tokens, segments, row_tokens, filler))
    whole = [row for row in rows if len(row.segments) == 1]
    shared = [row for row in rows if len(row.segments) > 1]
    return Packed([*whole, *shared], count, total, len(whole))


def pack_long(documents: Iterable[Tokens], row_tokens: int, filler: int = 0) -> Packed:
    """Spans of single documents where they are long enough; what is left over is joined, end to end.

    A joined row is one segment: its positions run on through the joints, so that far positions are trained
    even where no document reaches them (the end-of-text token tells the model where a document ends).
    """
    whole: list[Row] = []
    joined: list[Row] = []
    rest: Tokens = []
    count = total = 0
    for document in documents:
        count += 1
        total += len(document)
        full = len(document) // row_tokens * row_tokens
        spans = (document[at : at + row_tokens] for at in range(0, full, row_tokens))
        whole += [Row(span, [row_tokens]) for span in spans]
        rest = rest + document[full:]
        while len(rest) >= row_tokens:
            joined.append(Row(rest[:row_tokens], [row_tokens]))
            rest = rest[row_tokens:]
    if rest:
        joined.append(_filled(rest, [len(rest)], row_tokens, filler))
    return Packed([*whole, *joined], count, total, len(whole))


def _filled(tokens: Tokens, segments: list[int], row_tokens: int, filler: int) -> Row:
    """The last, short row."""
    padding = row_tokens - len(tokens)
    return Row([*tokens, *[filler] * padding], [*segments, padding], padding)
