"""How often each relative distance is trained by a set of rows."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..models import IGNORED
from .positions import Placed


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
