"""Which relative distances are trained, against brute force."""

import time

import numpy as np
from yarn_tune.data.packing import Row, pack_concat
from yarn_tune.data.positions import Placed, count_distances, place_contiguous


def brute_force(rows: list[Placed], window: int) -> list[int]:
    """Count (query with targets in its run, key) pairs by distance, the slow way."""
    counts = [0] * window
    for row in rows:
        document = np.cumsum([p == 0 for p in row.position_ids])
        for q, position in enumerate(row.position_ids):
            for k in range(q + 1):
                if document[q] == document[k]:
                    counts[position - row.position_ids[k]] += 1
    return counts


def test_coverage_of_full_and_packed_rows():
    rows = [place_contiguous(Row(np.arange(16), (16,))), place_contiguous(Row(np.arange(16), (10, 6)))]
    found = count_distances(rows, 16, bins=16)
    assert found.pairs == brute_force(rows, 16)
    assert found.untrained == 0


def test_short_documents_leave_the_window_untrained():
    rows = [place_contiguous(row) for row in pack_concat([np.ones(8, np.int32)] * 8, 32).rows]
    found = count_distances(rows, 32, bins=8)
    assert found.untrained == 0.75
    assert found.pairs[2:] == [0] * 6


def test_coverage_of_long_documents_takes_no_time():
    """A count for every pair of tokens would be 160 thousand million."""
    span = 400_000
    begun = time.process_time()
    row = place_contiguous(Row(np.zeros(2 * span, np.int32), (span, span)))
    pairs = count_distances([row], 2 * span, bins=4).pairs
    assert time.process_time() - begun < 5
    half = span // 2
    assert pairs == [half * (3 * half + 1), half * (half + 1), 0, 0]
