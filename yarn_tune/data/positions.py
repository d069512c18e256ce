"""Which position each token of a row gets, which targets count, and which relative distances a run trains.

Shapes: a `Placed` row holds three lists of `row_tokens` integers. Position ids that jump by anything but one are
how `transformers` detects document borders when no attention mask is given.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..models import IGNORED
from .packing import Row


@dataclass(frozen=True)
class Placed:
    """A row ready for the model. `labels[i]` is the token after `input_ids[i]`, or `IGNORED`."""

    input_ids: list[int]
    position_ids: list[int]
    labels: list[int]
    answers: int = 0
    """How many labels before the last one are the answer to a planted question."""

    def pieces(self, length: int, bos: int | None = None) -> "list[Placed]":
        """The row as shorter ones, each from position zero and, but for the first, begun with `bos`.

        Answers, whose needle may be elsewhere, do not count.
        """
        if length >= len(self.input_ids):
            return [self]
        labels = list(self.labels)
        if self.answers:
            labels[-self.answers - 1 : -1] = [IGNORED] * self.answers
        starts = range(0, len(labels) - length + 1, length)
        ids = self.input_ids
        cut = [Placed(ids[a : a + length], list(range(length)), labels[a : a + length]) for a in starts]
        return [cut[0], *(piece.with_bos(bos) for piece in cut[1:])]

    def with_bos(self, bos: int | None) -> "Placed":
        """The same row with `bos` in place of every token at position zero: as a model is asked that reads it first."""
        if bos is None:
            return self
        ids = [
            bos if position == 0 else token for token, position in zip(self.input_ids, self.position_ids, strict=True)
        ]
        return replace(self, input_ids=ids)

    @property
    def targets(self) -> int:
        """Tokens whose prediction counts."""
        return sum(label != IGNORED for label in self.labels)


def place_contiguous(row: Row) -> Placed:
    """Positions from zero in every segment; no prediction across segments or of filler."""
    positions: list[int] = []
    labels: list[int] = []
    at = 0
    for number, length in enumerate(row.segments):
        positions += range(length)
        filler = row.padding and number == len(row.segments) - 1
        inner = row.tokens[at + 1 : at + length]
        labels += [IGNORED] * length if filler else [*inner, IGNORED]
        at += length
    return Placed(row.tokens, positions, labels)


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


def coverage(rows: Iterable[Placed], window: int, bins: int = 16) -> Coverage:
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
    """Length of each run of consecutive positions that has a target; runs do not see each other."""
    runs: list[int] = []
    start = 0
    positions = row.position_ids
    for i in range(1, len(positions) + 1):
        if i == len(positions) or positions[i] != positions[i - 1] + 1:
            if any(label != IGNORED for label in row.labels[start:i]):
                runs.append(i - start)
            start = i
    return runs
