"""Which position each token of a row gets, which targets count, and which relative distances a run trains.

Shapes: a `Placed` row holds three lists of `row_tokens` integers. Position ids that jump by anything but one are
how `transformers` detects document borders when no attention mask is given, so rows whose spans must see each
other across a jump (`skip`) say so in `joined`, and the caller passes an all-ones mask with them.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .packing import Row, Tokens

IGNORED = -100
"""Label of a token whose successor is not its continuation; PyTorch's `ignore_index`."""


@dataclass(frozen=True)
class Placed:
    """A row ready for the model. `labels[i]` is the token after `input_ids[i]`, or `IGNORED`."""

    input_ids: list[int]
    position_ids: list[int]
    labels: list[int]
    joined: bool = False
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
        return [cut[0], *(piece.begun(bos) for piece in cut[1:])]

    def begun(self, bos: int | None) -> "Placed":
        """The same row with `bos` in place of every token at position zero: as a model is asked that reads it first."""
        if bos is None:
            return self
        ids = [
            bos if position == 0 else token for token, position in zip(self.input_ids, self.position_ids, strict=True)
        ]
        return replace(self, input_ids=ids)

    def only_last(self, tail: int) -> "Placed":
        """The same row, of whose targets only the last `tail` count."""
        skipped = max(0, len(self.labels) - tail)
        return replace(self, labels=[IGNORED] * skipped + self.labels[skipped:])

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


def place_skip(
    documents: Sequence[Tokens], window: int, row_tokens: int, spans: int, count: int, seed: int
) -> list[Placed]:
    """Rows of `spans` spans of one document at their true positions inside a stretch of `window` tokens.

    Documents are drawn in proportion to their length among those longer than a row; a document shorter than
    the window is used at its own length. Biased with frozen weights (see README): an experiment.

    Raises:
        ValueError: if no document is longer than a row.
    """
    rng = random.Random(seed)
    usable = [document for document in documents if len(document) > row_tokens]
    if not usable:
        raise ValueError(f"skip rows need a document longer than a row of {row_tokens} tokens")
    weights = [len(document) for document in usable]
    placed = []
    for _ in range(count):
        (document,) = rng.choices(usable, weights)
        stretch = min(window, len(document))
        origin = rng.randint(0, len(document) - stretch)
        lengths = [row_tokens // spans + (i < row_tokens % spans) for i in range(spans)]
        # Sorted cuts of the tokens left out give every arrangement of the spans the same chance.
        cuts = sorted(rng.randint(0, stretch - row_tokens) for _ in range(spans))
        ids: list[int] = []
        positions: list[int] = []
        labels: list[int] = []
        before = 0
        for length, cut in zip(lengths, cuts, strict=True):
            start = cut + before
            span = document[origin + start : origin + start + length]
            ids += span
            positions += range(start, start + length)
            labels += [*span[1:], IGNORED]
            before += length
        placed.append(Placed(ids, positions, labels, joined=True))
    return placed


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
    # Rows of one kind repeat the same arrangement, so each arrangement is counted once and multiplied.
    arrangements: dict[tuple[tuple[int, int], ...], int] = {}
    for row in rows:
        key = tuple(_runs(row))
        arrangements[key] = arrangements.get(key, 0) + 1
    for runs, times in arrangements.items():
        totals += times * _distances(runs, window)
    edges = [round(window * b / bins) for b in range(bins + 1)]
    counts = [int(totals[low:high].sum()) for low, high in zip(edges, edges[1:], strict=False)]
    return Coverage(edges, counts)


def _runs(row: Placed) -> list[tuple[int, int]]:
    """(first position, length) of each run of consecutive positions; separate documents are marked by -1."""
    runs: list[tuple[int, int]] = []
    start = 0
    positions = row.position_ids
    for i in range(1, len(positions) + 1):
        if i == len(positions) or positions[i] != positions[i - 1] + 1:
            if any(label != IGNORED for label in row.labels[start:i]):
                if runs and not row.joined:
                    runs.append((-1, 0))
                runs.append((positions[start], i - start))
            start = i
    return runs


def _distances(runs: tuple[tuple[int, int], ...], window: int) -> NDArray[np.float64]:
    """Pairs at each distance, `[window]`, for the runs of one row."""
    counts = np.zeros(window)
    seen: list[tuple[int, int]] = []
    for first, length in runs:
        if first < 0:
            seen = []
            continue
        distance = np.arange(length)
        counts[:length] += length - distance
        for other, width in seen:
            # Differences of two runs form a trapezoid: up in steps of one, level, and down again.
            low = first - (other + width - 1)
            rising = np.arange(1, length + width)
            counts[low : low + len(rising)] += np.minimum(np.minimum(rising, rising[::-1]), min(length, width))
        seen.append((first, length))
    return counts
