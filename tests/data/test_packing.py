"""No token lost, none twice; rows of one length."""

import random

import numpy as np
import pytest
from yarn_tune.data.packing import Tokens, pack_concat, pack_long
from yarn_tune.data.positions import place_contiguous
from yarn_tune.models.token_loss import IGNORED


def documents(seed: int, count: int, longest: int) -> list[Tokens]:
    rng, token = random.Random(seed), iter(range(1, 10**9))
    return [np.array([next(token) for _ in range(rng.randint(1, longest))], np.int32) for _ in range(count)]


@pytest.mark.parametrize("pack", [pack_long, pack_concat])
@pytest.mark.parametrize("row_tokens", [2, 7, 64])
@pytest.mark.parametrize("seed", range(5))
def test_every_token_once_and_rows_full(pack, row_tokens, seed):
    texts = documents(seed, 30, 100)
    packed = pack(texts, row_tokens)
    assert all(len(row.tokens) == sum(row.segments) == row_tokens for row in packed.rows)
    kept = [t for row in packed.rows for t in row.tokens[: row_tokens - row.padding]]
    assert sorted(kept) == [t for text in texts for t in text]
    assert packed.tokens == len(kept)
    assert packed.padding == len(packed.rows) * row_tokens - packed.tokens < row_tokens
    assert packed.documents == 30


def test_long_rows_are_spans_of_single_documents_first():
    texts = documents(1, 20, 300)
    packed = pack_long(texts, 64)
    owners = {int(token): number for number, text in enumerate(texts) for token in text}
    whole = packed.rows[: packed.whole_rows]
    assert len(whole) == sum(len(text) // 64 for text in texts)
    assert all(len({owners[int(t)] for t in row.tokens}) == 1 for row in whole)
    assert all(row.segments == (64,) for row in packed.rows if not row.padding)


def test_concat_isolates_documents_by_position():
    packed = pack_concat(map(np.array, [[1, 2, 3], [4, 5, 6, 7], [8]]), 5, filler=9)
    rows = {tuple(row.tokens.tolist()): place_contiguous(row) for row in packed.rows}
    first = rows[1, 2, 3, 4, 5]
    assert first.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert first.labels.tolist() == [2, 3, IGNORED, 5, IGNORED]
    last = rows[6, 7, 8, 9, 9]
    assert last.position_ids.tolist() == [0, 1, 0, 0, 1]
    assert last.labels.tolist() == [7, IGNORED, IGNORED, IGNORED, IGNORED]
    assert last.targets == 1


def test_a_joined_row_counts_positions_through():
    packed = pack_long(map(np.array, [[1, 2], [3, 4]]), 4)
    assert place_contiguous(packed.rows[0]).position_ids.tolist() == [0, 1, 2, 3]
    assert packed.whole_rows == 0
