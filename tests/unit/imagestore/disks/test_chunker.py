from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagestore.disks.chunker import block_sums, cut, runs, zero_blocks
from imagestore.errors import Invalid
from imagestore.formats.chunking import BLOCK, ChunkerParams

PARAMS = ChunkerParams()
SMALL = ChunkerParams(min_bytes=2 * BLOCK, average_bytes=4 * BLOCK, max_bytes=8 * BLOCK)


def disk(kinds, seed=1):
    """A disk with one block per entry: 0 is a zero block, another number always the same random block."""
    table = np.random.default_rng(seed).integers(0, 256, (16, BLOCK), dtype=np.uint8)
    table[0] = 0
    return table[np.array(kinds, dtype=np.int64)].reshape(-1)


def whole(data, cuts=(), hints=(), params=SMALL):
    sums = block_sums(data)
    chunks, used = cut(
        sums,
        zero_blocks(data, sums),
        0,
        *(np.array(told, np.int64) for told in (cuts, hints)),
        params,
        final=True,
    )
    assert used == len(sums)
    return chunks


def windowed(data, window, cuts=(), hints=(), params=SMALL):
    blocks, at, found = len(data) // BLOCK, 0, []
    end = 0
    while at < blocks:
        end = min(max(end, at) + window, blocks)
        part = data[at * BLOCK : end * BLOCK]
        sums = block_sums(part)
        chunks, used = cut(
            sums,
            zero_blocks(part, sums),
            at,
            *(np.array(told, np.int64) for told in (cuts, hints)),
            params,
            final=end == blocks,
        )
        found += [(at + start, at + stop) for start, stop in chunks]
        at += used
    return found


layouts = st.lists(st.integers(0, 15), min_size=1, max_size=200)


@given(layouts, st.integers(1, 40), st.sets(st.integers(0, 200)), st.sets(st.integers(0, 200)))
def test_windows_of_any_size_give_the_chunks_of_the_whole_disk(kinds, window, cuts, hints):
    data = disk(kinds)
    assert windowed(data, window, sorted(cuts), sorted(hints)) == whole(data, sorted(cuts), sorted(hints))


@given(layouts, st.sets(st.integers(0, 200)))
def test_a_hint_ends_a_chunk_unless_that_would_be_too_small(kinds, hints):
    for start, end in whole(disk(kinds), hints=sorted(hints)):
        assert not any(start + SMALL.min_bytes // BLOCK <= at < end for at in hints)


@given(layouts, st.sets(st.integers(0, 200)))
def test_chunks_cover_every_block_that_is_not_zero_once_and_no_other(kinds, cuts):
    data = disk(kinds)
    covered = [block for start, end in whole(data, sorted(cuts)) for block in range(start, end)]
    assert covered == [block for block, kind in enumerate(kinds) if kind]


@given(layouts, st.sets(st.integers(0, 200)))
def test_no_chunk_is_larger_than_the_maximum_or_goes_over_a_forced_cut(kinds, cuts):
    for start, end in whole(disk(kinds), sorted(cuts)):
        assert end - start <= SMALL.max_bytes // BLOCK
        assert not any(start < at < end for at in cuts)


def test_a_block_put_in_front_moves_only_the_chunks_near_it():
    kinds = np.random.default_rng(3).integers(0, 256, (4000, BLOCK), dtype=np.uint8)
    kinds[:, 0] |= 1
    before = kinds.reshape(-1)
    after = np.concatenate([np.full(BLOCK, 7, np.uint8), before])
    old = {before[s * BLOCK : e * BLOCK].tobytes() for s, e in whole(before, params=PARAMS)}
    new = [after[s * BLOCK : e * BLOCK].tobytes() for s, e in whole(after, params=PARAMS)]
    assert sum(chunk not in old for chunk in new) <= 4


def test_the_average_of_random_data_is_near_the_one_asked_for():
    data = np.random.default_rng(5).integers(0, 256, 64 << 20, dtype=np.uint8)
    chunks = whole(data, params=PARAMS)
    assert 28 << 10 < len(data) / len(chunks) < 40 << 10


def test_a_block_whose_words_only_add_up_to_zero_is_data():
    data = np.zeros(3 * BLOCK, np.uint8)
    data[BLOCK : BLOCK + 16].view("<u8")[:] = (1, 2**64 - 1)
    assert zero_blocks(data, block_sums(data)).tolist() == [True, False, True]


def test_runs_are_found_at_both_ends():
    assert runs(np.array([True, False, True, True])) == [(0, 1), (2, 4)]
    assert runs(np.zeros(0, np.bool_)) == []


@pytest.mark.parametrize(
    "change",
    [{"name": "rabin"}, {"min_bytes": 5000}, {"max_bytes": 4096}, {"average_bytes": 24 << 10}, {"more": 1}],
)
def test_parameters_nobody_knows_are_refused(change):
    with pytest.raises(Invalid):
        ChunkerParams.from_dict({**asdict(PARAMS), **change})
