"""Caches of one fingerprint become one, and a part of a cache one of its own: the same rows, each sample once."""

from __future__ import annotations

import dataclasses
import gc
import os
import weakref

import pytest
from cache_samples import SPEC, TENSORS, key_of, make_row
from grown_caches import PLACES, cache_of, content, grow, keys_of_numbers, objects_below, place, plan_of_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache_killed import killed

from alignkd.cache_store.codecs import get_codec
from alignkd.cache_store.errors import CorruptShardError, FingerprintMismatchError, MissingRowError
from alignkd.cache_store.protocol.maintenance.merge import check_shared, merge, plan_merge
from alignkd.cache_store.protocol.maintenance.subset import find_keys, select, subset
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import CacheStore, open_store
from alignkd.cache_store.rows.spec import CacheSpec
from alignkd.cache_store.storage.local import LocalStorage
from alignkd.errors import CacheError, ConfigError, DataError

_URLS = iter(range(10_000))


def merged(*urls, to, prefer_first=False, **options):
    merging = plan_merge(urls)
    check_shared(merging, prefer_first=prefer_first)
    return merge(merging, to, **options)


def part_of(url, to, numbers=None, spec=None, **options):
    reader = CacheReader(url)
    selection = select(reader, None if numbers is None else keys_of_numbers(numbers))
    return subset(reader, selection, to, spec or reader.spec, **{"tensors": reader.tensors.entries, **options})


def other_row(i):
    """The row of a sample after another batch: one target differs."""
    row = make_row(i)
    return dataclasses.replace(row, values={**row.values, "mass": row.values["mass"] + 1})


@pytest.mark.parametrize(("where", "shard_format"), PLACES)
def test_a_merged_cache_and_a_part_of_it_have_the_content_of_caches_written_at_once(request, tmp_path, where, shard_format):
    url = place(request, tmp_path, where)
    cache_of(tmp_path / "a", range(7), shard_format=shard_format, reject=(4,))
    cache_of(tmp_path / "b", [*range(12, 5, -1)], shard_format="zarr", shard_samples=3)
    store = merged(tmp_path / "a", tmp_path / "b", to=url)
    assert (store.manifest.shard_format, store.plan.shard_samples, store.pending()) == (shard_format, 4, [])
    assert content(url) == content(cache_of(tmp_path / "at-once", range(13), reject=(4,)))
    assert list(CacheReader(url).rejected) == [key_of(4)]
    wanted = [11, 4, 0, 8, 5]
    part_of(url, tmp_path / "part", wanted, shard_format="zarr", shard_samples=2)
    assert content(tmp_path / "part") == content(cache_of(tmp_path / "part-at-once", wanted, reject=(4,)))


@settings(max_examples=6, deadline=None)
@given(
    order=st.permutations(range(12)),
    cut=st.integers(1, 11),
    overlap=st.integers(0, 4),
    sizes=st.tuples(*[st.integers(1, 5)] * 4),
    wanted=st.sets(st.integers(0, 11), min_size=1),
)
def test_any_two_caches_merge_and_any_part_is_taken(order, cut, overlap, sizes, wanted):
    root = f"memory://merge-{next(_URLS)}"
    cache_of(f"{root}/a", order[:cut], shard_samples=sizes[0])
    cache_of(f"{root}/b", order[max(0, cut - overlap) :], shard_samples=sizes[1])
    merged(f"{root}/a", f"{root}/b", to=f"{root}/m", shard_samples=sizes[2])
    assert content(f"{root}/m") == content(cache_of(f"{root}/at-once", range(12)))
    part_of(f"{root}/m", f"{root}/part", wanted, shard_samples=sizes[3])
    assert content(f"{root}/part") == content(cache_of(f"{root}/part-at-once", sorted(wanted)))


def test_a_grown_cache_is_merged_and_parted_like_another(tmp_path):
    cache_of(tmp_path / "a", range(5))
    grow(tmp_path / "a", range(9), shard_samples=2)
    cache_of(tmp_path / "b", range(20, 23))
    cache_of(tmp_path / "c", range(7, 11))
    merged(tmp_path / "a", tmp_path / "b", tmp_path / "c", to=tmp_path / "m")
    assert content(tmp_path / "m") == content(cache_of(tmp_path / "at-once", [*range(11), *range(20, 23)]))
    part_of(tmp_path / "a", tmp_path / "part", range(3, 8))
    assert content(tmp_path / "part") == content(cache_of(tmp_path / "part-at-once", range(3, 8)))


def test_a_row_is_better_than_a_rejection(tmp_path):
    cache_of(tmp_path / "a", range(6), reject=(2, 3))
    cache_of(tmp_path / "b", range(2, 8), reject=(3, 4))
    merged(tmp_path / "a", tmp_path / "b", to=tmp_path / "m")
    assert content(tmp_path / "m") == content(cache_of(tmp_path / "at-once", range(8), reject=(3,)))


def test_no_row_is_decoded(tmp_path, monkeypatch):
    cache_of(tmp_path / "a", range(6))
    cache_of(tmp_path / "b", range(4, 9))

    def fail(*_args):
        raise AssertionError("decoded")

    for field in SPEC.fields:
        monkeypatch.setattr(type(get_codec(field.codec)), "decode", fail)
    assert merged(tmp_path / "a", tmp_path / "b", to=tmp_path / "m").pending() == []


def test_rows_that_differ_are_refused_by_name_before_anything_is_written_or_the_first_is_taken(tmp_path):
    cache_of(tmp_path / "a", range(6))
    cache_of(tmp_path / "b", range(4, 9), row=other_row)
    with pytest.raises(
        CacheError, match=r"2 samples have other rows .* 'sample-4/é', 'sample-5/é'.* differs in mass .*--prefer"
    ):
        merged(tmp_path / "a", tmp_path / "b", to=tmp_path / "m")
    assert not (tmp_path / "m").exists()
    merged(tmp_path / "a", tmp_path / "b", to=tmp_path / "m", prefer_first=True)
    reader = CacheReader(tmp_path / "m")
    for i in range(9):
        expected = make_row(i) if i < 6 else other_row(i)
        assert reader.row(key_of(i)).values["mass"] == expected.values["mass"]


def test_a_sample_with_another_image_is_refused_whatever_is_preferred(tmp_path):
    cache_of(tmp_path / "a", range(3))
    cache_of(
        tmp_path / "b",
        range(3),
        row=lambda i: dataclasses.replace(make_row(i), image_sha256="f" * 64) if i == 1 else make_row(i),
    )
    with pytest.raises(CacheError, match=r"'sample-1/é'.* differs in image_sha256 .* do not belong together"):
        merged(tmp_path / "a", tmp_path / "b", to=tmp_path / "m", prefer_first=True)


def test_caches_of_other_settings_or_other_tensors_are_refused(tmp_path):
    cache_of(tmp_path / "a", range(3))
    cache_of(tmp_path / "b", range(3, 6), spec=CacheSpec(SPEC.fields, {**SPEC.fingerprint, "top_k": 9}))
    with pytest.raises(FingerprintMismatchError, match="top_k: cache has 8, wanted 9"):
        plan_merge([tmp_path / "a", tmp_path / "b"])
    tensors = {**TENSORS, "head": TENSORS["head"] + 1}
    other = CacheStore.create_or_open(tmp_path / "c", SPEC, plan_of_numbers([7]), shard_format="zarr", tensors=tensors)
    other.commit_shard(0, [make_row(7)], [])
    with pytest.raises(CacheError, match=r"other tensors \(head\).* --calibration-from"):
        plan_merge([tmp_path / "a", tmp_path / "c"])


def test_a_cache_that_is_not_complete_is_not_a_source(tmp_path):
    cache_of(tmp_path / "a", range(3))
    CacheStore.create_or_open(tmp_path / "b", SPEC, plan_of_numbers(range(5, 9)), shard_format="zarr", tensors=TENSORS)
    with pytest.raises(MissingRowError, match="is not complete: 4 of the 4 samples"):
        plan_merge([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(MissingRowError, match="is not complete: 1 of the 1 samples"):
        part_of(tmp_path / "b", tmp_path / "part", [6])


def test_what_the_cache_lacks_is_named(tmp_path):
    cache_of(tmp_path / "a", range(3))
    with pytest.raises(MissingRowError, match=f"never planned to hold 2 of the 3 samples .* key {key_of(8)}: .*append"):
        part_of(tmp_path / "a", tmp_path / "part", [1, 8, 9])
    with pytest.raises(DataError, match="without samples"):
        part_of(tmp_path / "a", tmp_path / "part", [])
    assert not (tmp_path / "part").exists()


def test_samples_are_found_by_their_ids(tmp_path):
    cache_of(tmp_path / "a", range(9), reject=(4,))
    reader = CacheReader(tmp_path / "a")
    found = find_keys(reader, ["sample-4/é", "sample-7/é"])
    assert sorted(map(tuple, found)) == sorted(map(tuple, keys_of_numbers([4, 7])))
    with pytest.raises(DataError, match="no sample of 1 of the 2 ids asked for, the first of them 'no'"):
        find_keys(reader, ["no", "sample-1/é"])


def test_fields_and_tensors_are_left_out(tmp_path):
    cache_of(tmp_path / "a", range(9))
    spec = CacheSpec(tuple(field for field in SPEC.fields if field.name != "vision"), {"top_k": 1, "data": "x"})
    store = part_of(tmp_path / "a", tmp_path / "part", spec=spec, tensors=["head"])
    assert set(store.manifest.tensors) == {"head"}
    assert len(content(store.url)) == 64
    assert set(CacheReader(store.url).row(key_of(1)).values) == {"attention", "token_ids", "mass"}
    assert store.spec.fingerprint["data"] not in ("x", "")


def test_its_own_place_and_one_cache_twice_are_refused(tmp_path):
    cache_of(tmp_path / "a", range(3))
    cache_of(tmp_path / "b", range(3, 5))
    before = objects_below(tmp_path / "a", "shards", "commits", "plan")
    with pytest.raises(ConfigError, match="is one of the caches"):
        merged(tmp_path / "a", tmp_path / "b", to=str(tmp_path / "a"))
    with pytest.raises(ConfigError, match="is the cache itself"):
        part_of(tmp_path / "a", str(tmp_path / "a"), [1])
    for urls in ([tmp_path / "a"], [tmp_path / "a", str(tmp_path / "a")]):
        with pytest.raises(ConfigError, match="expected two caches or more"):
            plan_merge(urls)
    assert objects_below(tmp_path / "a", "shards", "commits", "plan") == before


def test_another_cache_at_the_target_is_refused_and_left_alone(tmp_path):
    cache_of(tmp_path / "a", range(6))
    cache_of(tmp_path / "b", range(6, 9))
    cache_of(tmp_path / "there", range(4))
    before = objects_below(tmp_path / "there", "shards", "commits", "plan")
    for write in (
        lambda: merged(tmp_path / "a", tmp_path / "b", to=tmp_path / "there"),
        lambda: part_of(tmp_path / "a", tmp_path / "there", [1, 2]),
    ):
        with pytest.raises(FingerprintMismatchError):
            write()
    assert objects_below(tmp_path / "there", "shards", "commits", "plan") == before


def test_a_damaged_shard_of_a_source_is_refused(tmp_path):
    cache_of(tmp_path / "a", range(6))
    cache_of(tmp_path / "b", range(6, 9))
    (tmp_path / "a" / open_store(tmp_path / "a").status().records[1].object).write_bytes(b"x")
    with pytest.raises(CorruptShardError, match="shard 1 "):
        merged(tmp_path / "a", tmp_path / "b", to=tmp_path / "m")
    assert (verify(tmp_path / "m").problems, verify(tmp_path / "m").incomplete) == ([], 2)


@pytest.mark.processes
@pytest.mark.parametrize("counted", [(os, "fsync"), (LocalStorage, "write")], ids=["fsync", "write"])
@pytest.mark.parametrize("at", [1, 3, 5, 7])
def test_what_was_killed_is_finished_by_another(tmp_path, counted, at):
    cache_of(tmp_path / "a", range(8))
    cache_of(tmp_path / "b", range(6, 15))
    for name, write in (
        ("m", lambda: merged(tmp_path / "a", tmp_path / "b", to=tmp_path / "m")),
        ("part", lambda: part_of(tmp_path / "a", tmp_path / "part", range(1, 8), shard_samples=2)),
    ):
        assert killed(write, counted, at)
        if (tmp_path / name / "cache.json").exists():
            assert not open_store(tmp_path / name).status().complete
        write()
    assert content(tmp_path / "m") == content(cache_of(tmp_path / "at-once", range(15)))
    assert content(tmp_path / "part") == content(cache_of(tmp_path / "part-at-once", range(1, 8)))


@pytest.mark.slow
def test_few_rows_of_many_shards_do_not_keep_those_in_memory(tmp_path, monkeypatch):
    cache_of(tmp_path / "a", range(8), shard_samples=1)
    reader, alive, most = CacheReader(tmp_path / "a", max_shards=2), weakref.WeakSet(), [0]
    real = reader._shards.fetch

    def fetch(number):
        shard = real(number)
        alive.add(shard)
        gc.collect()
        most.append(len(alive))
        return shard

    monkeypatch.setattr(reader._shards, "fetch", fetch)
    subset(reader, select(reader, None), tmp_path / "b", reader.spec, tensors=reader.tensors.entries, shard_samples=8)
    assert len(most) > 8
    assert max(most) <= 4
