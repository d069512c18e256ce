"""Positions and the coverage report, against brute force."""

import time

import numpy as np
import pytest
from yarn_tune.packing import Row, pack_concat
from yarn_tune.positions import IGNORED, Placed, coverage, place_contiguous, place_skip


def brute_force(rows: list[Placed], window: int) -> list[int]:
    """Count (query with targets in its run, key) pairs by distance, the slow way."""
    counts = [0] * window
    for row in rows:
        document = np.cumsum([p == 0 for p in row.position_ids]) if not row.joined else np.zeros(len(row.labels))
        for q, position in enumerate(row.position_ids):
            for k in range(q + 1):
                if document[q] == document[k]:
                    counts[position - row.position_ids[k]] += 1
    return counts


def test_coverage_of_full_and_packed_rows():
    rows = [place_contiguous(Row(list(range(16)), [16])), place_contiguous(Row(list(range(16)), [10, 6]))]
    found = coverage(rows, 16, bins=16)
    assert found.pairs == brute_force(rows, 16)
    assert found.untrained == 0


def test_short_documents_leave_the_window_untrained():
    rows = [place_contiguous(row) for row in pack_concat([[1] * 8] * 8, 32).rows]
    found = coverage(rows, 32, bins=8)
    assert found.untrained == 0.75
    assert found.pairs[2:] == [0] * 6


def test_skip_rows():
    texts = [list(range(1000, 2000)), list(range(3000, 3300)), [1, 2, 3]]
    rows = place_skip(texts, window=256, row_tokens=32, spans=3, count=20, seed=0)
    assert rows == place_skip(texts, 256, 32, 3, 20, seed=0)
    assert rows != place_skip(texts, 256, 32, 3, 20, seed=1)
    for row in rows:
        assert len(row.input_ids) == len(row.position_ids) == len(row.labels) == 32
        assert 0 <= row.position_ids[0] <= row.position_ids[-1] < 256
        offsets = {token - position for token, position in zip(row.input_ids, row.position_ids, strict=True)}
        assert len(offsets) == 1, "positions are the true ones, up to the stretch's origin"
        assert all(np.diff(row.position_ids) >= 1)
        assert [label for label in row.labels if label != IGNORED] == [
            token + 1 for token, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORED
        ]
        assert row.labels.count(IGNORED) == 3
    assert coverage(rows, 256, bins=256).pairs == brute_force(rows, 256)


def test_coverage_of_long_spans_takes_no_time():
    """A count for every pair of tokens would be 160 thousand million."""
    span = 400_000
    begun = time.process_time()
    row = Placed([0] * 2 * span, [*range(span), *range(2 * span, 3 * span)], [1] * 2 * span, joined=True)
    pairs = coverage([row], 3 * span, bins=3).pairs
    assert time.process_time() - begun < 5
    inside = span * (span + 1)
    assert pairs == [inside, span * (span - 1) // 2, span * (span + 1) // 2]


def test_skip_rows_need_a_long_document():
    with pytest.raises(ValueError, match="longer than a row of 32"):
        place_skip([[1] * 32], 256, 32, 2, 1, 0)
