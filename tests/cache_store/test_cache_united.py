"""Caches of one teacher read as one: each row is found, whichever cache has it."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from cache_samples import key_of, make_row
from grown_caches import cache_of

from alignkd.cache_store.errors import MissingRowError
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.united import UnitedReader, are_alike
from alignkd.errors import CacheError


@pytest.fixture
def parts(tmp_path):
    """Two caches, of the samples 0 to 9 and 10 to 15; sample 12 is rejected."""
    urls = [cache_of(tmp_path / "a", range(10)), cache_of(tmp_path / "b", range(10, 16), reject=[12])]
    return [CacheReader(url) for url in urls]


def test_every_row_of_every_cache_is_read_and_shards_are_numbered_one_after_the_other(parts):
    united = UnitedReader(parts)
    wanted = [number for number in range(16) if number != 12]
    assert len(united) == len(wanted)
    assert list(united) == [key for reader in parts for key in reader]
    for number, row in zip(wanted, united.rows(key_of(number) for number in wanted), strict=True):
        alone = parts[number >= 10].row(key_of(number))
        assert (row.sample_id, row.image_sha256) == (make_row(number).sample_id, alone.image_sha256)
        for name, value in alone.values.items():
            np.testing.assert_array_equal(row.values[name], value, err_msg=name)
    assert [united.shard_of(key_of(number)) for number in (0, 9, 10, 15)] == [0, 2, 3, 4]


def test_what_is_missing_is_said_as_one_cache_says_it(parts):
    united = UnitedReader(parts)
    with pytest.raises(MissingRowError, match="was rejected when the cache was written"):
        united.row(key_of(12))
    with pytest.raises(MissingRowError, match="never planned"):
        united.row(key_of(20))
    assert all(reader.url in united.url for reader in parts)


def test_lengths_are_those_of_the_caches_one_after_the_other(parts):
    lengths = UnitedReader(parts).first_dimensions("token_ids")
    np.testing.assert_array_equal(lengths, np.concatenate([reader.first_dimensions("token_ids") for reader in parts]))
    assert lengths[12] == -1


def test_a_sent_reader_reads_the_same(parts):
    sent = pickle.loads(pickle.dumps(UnitedReader(parts)))
    assert sent.row(key_of(15)).sample_id == make_row(15).sample_id


def test_caches_that_share_samples_are_refused_with_what_to_do(parts, tmp_path):
    other = CacheReader(cache_of(tmp_path / "c", range(8, 12)))
    assert are_alike(parts[0], other)
    with pytest.raises(CacheError, match=r"samples in common .* alignkd cache merge"):
        UnitedReader([parts[0], other])
