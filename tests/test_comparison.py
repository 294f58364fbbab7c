"""The model side of a conversion: the lengths of its table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrator.comparison import table_lengths

K = 1 << 10
MUCH = 1 << 30


@pytest.mark.parametrize(
    ("train_len", "target_len", "available", "every_octave", "lengths"),
    [
        (256, 8 * K, MUCH, False, [256, 2 * K, 8 * K, 32 * K]),
        (256, 8 * K, 20 * K, False, [256, 2 * K, 8 * K]),
        (2 * K, 32 * K, MUCH, True, [2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K]),
        (2 * K, 24 * K, MUCH, True, [2 * K, 3 * K, 6 * K, 12 * K, 24 * K, 48 * K, 96 * K]),
        (2 * K, 3000, MUCH, False, [2 * K, 4 * K, 16 * K]),
        (1000, 1000, 1000, False, [1000]),
    ],
)
def test_lengths_of_the_table(
    train_len: int, target_len: int, available: int, every_octave: bool, lengths: list[int]
) -> None:
    assert table_lengths(train_len, target_len, available, every_octave) == lengths


@given(st.integers(1, 5000), st.integers(2, 200_000), st.integers(1, 1 << 20), st.booleans())
def test_table_has_training_and_target_length_and_all_tile_one_span(
    train_len: int, target_len: int, available: int, every_octave: bool
) -> None:
    train_len = min(train_len, target_len)
    lengths = table_lengths(train_len, target_len, available, every_octave)
    assert max(2, train_len) in lengths and (target_len in lengths or target_len % max(2, train_len))
    assert all(max(lengths) % length == 0 for length in lengths)
    assert max(lengths) < target_len + train_len + 2 or 2 * max(lengths) <= available
