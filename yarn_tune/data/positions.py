"""The position of each token of a row, the targets that count, and how often rows train each relative distance.

Without an attention mask, `transformers` detects document borders from position ids that do not increase by one. A row
stores only token ids, in 4 bytes each; positions and labels are computed when they are needed.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..models import IGNORED
from .packing import Row, Tokens


@dataclass(frozen=True, eq=False)
class Placed:
    """A row ready for the model: `input_ids`, `position_ids` and `labels`, int32 `[row_tokens]` each."""

    input_ids: Tokens
    segments: tuple[int, ...]
    """Lengths of the runs of tokens that attend to each other; positions begin from zero in each."""
    padding: int = 0
    """Filler tokens at the end, which are a segment of their own."""
    prefix: int = 0
    """Tokens at the beginning of each segment that do not belong to the document and are not targets."""
    answers: int = 0
    """How many labels before the last one are the answer to a planted question."""
    cut_labels: Tokens | None = None
    """The labels of a piece of a longer row; the last label is the first token of the next piece."""

    @property
    def position_ids(self) -> Tokens:
        """Positions from zero in every segment."""
        return np.concatenate([np.arange(length, dtype=np.int32) for length in self.segments])

    @property
    def labels(self) -> Tokens:
        """`labels[i]` is the token after `input_ids[i]`, or `IGNORED`: across segments, for filler and the prefix."""
        labels = np.full(len(self.input_ids), IGNORED, np.int32)
        if self.cut_labels is None:
            labels[:-1] = self.input_ids[1:]
            labels[np.cumsum(self.segments) - 1] = IGNORED
            if self.padding:
                labels[-self.padding :] = IGNORED
        else:
            labels[:] = self.cut_labels
        if self.prefix > 1:
            for start in np.cumsum((0, *self.segments[:-1])):
                labels[start : start + self.prefix - 1] = IGNORED
        return labels

    def pieces(self, length: int, prefix: tuple[int, ...] = ()) -> "list[Placed]":
        """Cut the row into shorter ones, each with positions from zero; all but the first begin with `prefix`.

        Answers do not count, since their needle may be in another piece.
        """
        if length >= len(self.input_ids):
            return [self]
        labels, ids = self.labels, self.input_ids
        if self.answers:
            labels[-self.answers - 1 : -1] = IGNORED
        starts = range(0, len(labels) - length + 1, length)
        cut = [Placed(ids[a : a + length], (length,), cut_labels=labels[a : a + length]) for a in starts]
        return [cut[0], *(piece.with_prefix(prefix) for piece in cut[1:])]

    def with_prefix(self, prefix: tuple[int, ...]) -> "Placed":
        """The row with `prefix` in place of the first tokens of every segment."""
        if not prefix:
            return self
        ids, at = self.input_ids.copy(), 0
        for length in self.segments:
            shorter = prefix[:length]
            ids[at : at + len(shorter)] = shorter
            at += length
        return replace(self, input_ids=ids, prefix=len(prefix))

    @property
    def targets(self) -> int:
        """Tokens whose prediction counts."""
        return int((self.labels != IGNORED).sum())


def place_contiguous(row: Row) -> Placed:
    """Positions from zero in every segment; no prediction across segments or of filler."""
    return Placed(row.tokens, row.segments, row.padding)


@dataclass(frozen=True)
class Coverage:
    """How often each relative distance is trained.

    `pairs[b]` counts (query with a target, key) pairs at distances `edges[b]` to `edges[b + 1] - 1`.
    """

    edges: list[int]
    pairs: list[int]

    @property
    def untrained(self) -> float:
        """Share of the window's distances whose bin was never trained."""
        widths = np.diff(self.edges)
        return float(widths[np.array(self.pairs) == 0].sum() / widths.sum())


def count_distances(rows: Iterable[Placed], window: int, bins: int = 16) -> Coverage:
    """Count the relative distances that `rows` train, in `bins` equal bins of the target window."""
    totals: NDArray[np.float64] = np.zeros(window)
    # Many documents have the same length, so each length is counted once and multiplied.
    lengths = Counter(length for row in rows for length in _runs(row))
    for length, times in lengths.items():
        totals[:length] += times * (length - np.arange(length))
    edges = [round(window * b / bins) for b in range(bins + 1)]
    counts = [int(totals[low:high].sum()) for low, high in zip(edges, edges[1:], strict=False)]
    return Coverage(edges, counts)


def _runs(row: Placed) -> list[int]:
    """Length of each segment that has a target; tokens do not attend across segments."""
    counted = row.labels != IGNORED
    ends = np.cumsum(row.segments)
    return [length for length, end in zip(row.segments, ends, strict=True) if counted[end - length : end].any()]
