"""Whatever bit of whatever object is flipped, wherever it is cut off: it is found, and no row of it is given out."""

from __future__ import annotations

import pytest
from cache_flips import Damage, is_found, random_damages, small_cache
from cache_samples import all_names

from alignkd.cache_store.storage import open_storage


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def cache(request, tmp_path_factory):
    return small_cache(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("seed", range(4))
def test_every_random_flip_and_truncation_is_found(cache, seed):
    damages = random_damages(cache, 25, seed)
    assert {damage.name for damage in damages} == set(all_names(open_storage(cache)))
    assert [damage for damage in damages if not is_found(cache, damage)] == []


def test_the_first_and_the_last_bit_of_every_object_are_found(cache):
    for name in all_names(open_storage(cache)):
        last = (cache / name).stat().st_size - 1
        for damage in (Damage(name, 0, 0), Damage(name, last, 7), Damage(name, 0, None), Damage(name, last, None)):
            assert is_found(cache, damage), damage


class Nothing(Damage):
    def of(self, data: bytes) -> bytes:
        return data


def test_where_nothing_was_done_nothing_is_found(cache):
    assert not any(is_found(cache, Nothing(name, 0, 0)) for name in all_names(open_storage(cache)))
