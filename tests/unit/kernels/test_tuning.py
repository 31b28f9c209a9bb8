"""The rules that choose block sizes and splits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.kernels import tuning

WIDTHS = st.integers(1, 40_000)
ROWS = st.integers(0, 4096)


@given(width=WIDTHS, rank=st.integers(1, 256), rows=ROWS, projections=st.integers(1, 3), processors=st.integers(1, 200))
def test_decode_parts_cover_every_column_once(width, rank, rows, projections, processors) -> None:
    """The parts tile the columns, the splits the parts; neither has an empty one, and no split asks for blocks less."""
    cut = tuning.decode(width, rank, rows, projections, processors=processors)
    assert (cut.parts - 1) * cut.part < width <= cut.parts * cut.part
    assert cut.part % cut.block_in == 0
    assert 1 <= cut.parts <= tuning.DECODE_PARTS
    each = -(-cut.parts // cut.splits)
    assert (cut.splits - 1) * each < cut.parts <= cut.splits * each


@given(width=WIDTHS, rank=st.integers(1, 256), rows=st.lists(ROWS, min_size=2, max_size=2))
def test_what_a_row_sums_does_not_depend_on_its_batch(width, rank, rows) -> None:
    """The parts and every block size are the layer's; only the splits follow the batch."""
    few, many = (tuning.decode(width, rank, n, 1, processors=132) for n in sorted(rows))
    assert (few.part, few.parts, few.block_in, few.block_rank, few.block_out) == (
        (many.part, many.parts, many.block_in, many.block_rank, many.block_out)
    )
    assert few.splits >= many.splits


@pytest.mark.parametrize(
    ("width", "rows", "projections", "splits"),
    [(4096, 1, 3, 16), (4096, 32, 1, 16), (4096, 32, 3, 6), (4096, 256, 3, 1), (14336, 1, 1, 14), (576, 1, 1, 3)],
)
def test_decode_splits(width: int, rows: int, projections: int, splits: int) -> None:
    """Few rows are split as far as the columns allow (4096: 16 ways, not 64), many rows not at all."""
    assert tuning.decode(width, 16, rows, projections, processors=132).splits == splits


@given(width=WIDTHS, rank=st.integers(1, 256), tiles=ROWS, projections=st.integers(1, 3))
def test_prefill_splits_cover_every_column_once(width, rank, tiles, projections) -> None:
    """The splits tile the columns, in whole blocks, and none is empty."""
    cut = tuning.prefill(width, rank, tiles, projections, processors=132)
    assert (cut.splits - 1) * cut.split_in < width <= cut.splits * cut.split_in
    assert cut.split_in % cut.block_in == 0
    assert 1 <= cut.splits <= tuning.PREFILL_SPLITS


@pytest.mark.parametrize(
    ("rows", "segments", "way"),
    [
        (1, 1, "decode"),
        (16, 1, "decode"),
        (17, 1, "prefill"),
        (256, 256, "decode"),
        (256, 64, "decode"),
        (257, 64, "prefill"),
    ],
)
def test_way(rows: int, segments: int, way: str) -> None:
    """Few rows, or few for each adapter, go one by one; a prompt goes by tiles."""
    assert tuning.choose_way(rows, segments) == way


@pytest.mark.parametrize(
    ("rows", "segments", "size"), [(0, 0, 16), (20, 4, 16), (64, 2, 32), (64, 1, 64), (9999, 1, 64)]
)
def test_tiles_are_as_large_as_a_segment_fills(rows: int, segments: int, size: int) -> None:
    """A tile is at least a tensor core's 16 rows, at most 64, and on average full."""
    assert tuning.block_rows(rows, segments) == size
