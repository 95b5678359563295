"""Tensors stored once per cache: made by one run, used by all others, and verified whenever they are read."""

from __future__ import annotations

import itertools
import pickle
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from cache_samples import (
    SPEC,
    TENSORS,
    all_names,
    commit,
    contents,
    fill,
    flip,
    full_cache,
    in_process,
    key_of,
    make_store,
    overwrite,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from alignkd.cache_store.errors import DamagedTensorError, FingerprintMismatchError, MissingTensorError
from alignkd.cache_store.protocol.maintenance.convert import convert
from alignkd.cache_store.protocol.maintenance.repair import repair
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import CacheStore, open_store
from alignkd.cache_store.protocol.tensors import DTYPES, Tensors, read_tensor, write_tensors
from alignkd.cache_store.rows.spec import CacheSpec
from alignkd.cache_store.storage import Storage, open_storage
from alignkd.cache_store.storage.local import LocalStorage

OTHER = {name: array + 1 for name, array in TENSORS.items()}


def objects(url) -> list[str]:
    return [name for name in all_names(open_storage(url)) if name.startswith("tensors/")]


def named(url, name: str) -> str:
    (found,) = (path for path in objects(url) if path.startswith(f"tensors/{name}-"))
    return found


def assert_same(found: Tensors, expected: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(found[name], array)


class CountedSource:
    """Gives tensors and counts how often it was asked to."""

    def __init__(self, tensors: dict[str, np.ndarray] = TENSORS, before: Callable[[], object] = lambda: None) -> None:
        self.tensors, self.before, self.calls = tensors, before, 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        self.before()
        return self.tensors


ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=1, min_side=0) | st.just(()))
)


@settings(max_examples=60, deadline=None)
@given(array=ARRAYS)
def test_any_tensor_comes_back_to_the_bit_and_numpy_alone_reads_its_file(tmp_path_factory, array):
    folder = tmp_path_factory.mktemp("tensors")
    storage = LocalStorage(folder)
    (entry,) = write_tensors(storage, {"x": array}).values()
    for found in (read_tensor(storage, entry), np.load(folder / entry.object, allow_pickle=False)):
        assert (found.dtype.str, found.shape, found.tobytes()) == (array.dtype.str, array.shape, array.tobytes())


@pytest.mark.parametrize("layout", [lambda a: a.T, lambda a: a[::2], lambda a: a.astype(">f4"), np.asfortranarray])
def test_the_layout_in_memory_does_not_matter(tmp_path, layout):
    array = layout(np.arange(24, dtype=np.float32).reshape(4, 6))
    (entry,) = write_tensors(LocalStorage(tmp_path), {"x": array}).values()
    plain = np.ascontiguousarray(array, dtype="<f4")
    assert write_tensors(LocalStorage(tmp_path), {"x": plain}) == {"x": entry}
    assert np.array_equal(read_tensor(LocalStorage(tmp_path), entry), plain)


@pytest.mark.parametrize(
    "array", [np.zeros(2), np.zeros(2, "i8"), np.zeros(2, bool), np.array([print]), np.zeros((1,) * 9, "f4")]
)
def test_what_is_no_tensor_is_refused_and_no_cache_begun(tmp_path, array):
    with pytest.raises(ValueError, match=r"tensor 'x': found (dtype|shape)"):
        make_store(tmp_path / "cache", tensors={"x": array})
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["", "X", "../x", "a/b", "a-b", "é", "1a", "a" * 201])
def test_a_name_that_is_no_file_everywhere_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="expected lower-case letters"):
        make_store(tmp_path / "cache", tensors={name: np.zeros(1, "f4")})
    assert not (tmp_path / "cache").exists()


def test_tensors_are_kept_and_read_on_any_storage(url):
    store = make_store(url, tensors=TENSORS)
    commit(store, 0)
    assert_same(store.tensors, TENSORS)
    assert_same(open_store(url).tensors, TENSORS)
    assert_same(CacheReader(url).tensors, TENSORS)
    report = verify(url)
    assert (report.problems, report.strays, report.rows) == ([], [], 4)


def test_a_cache_without_tensors_has_none(tmp_path):
    assert list(make_store(tmp_path).tensors) == []
    assert not (tmp_path / "tensors").exists()
    assert open_store(tmp_path).status().tensor_bytes == 0


def test_a_name_that_is_not_kept_is_told_with_those_that_are(tmp_path):
    tensors = make_store(tmp_path, tensors=TENSORS).tensors
    with pytest.raises(ValueError, match=r"has no tensor 'tail', it has: head, slice\.weight") as caught:
        tensors["tail"]
    assert isinstance(caught.value, MissingTensorError)
    assert str(caught.value).startswith("the cache at")
    assert (tensors.get("tail"), "tail" in tensors, "head" in tensors, len(tensors)) == (None, False, True, 2)
    with pytest.raises(ValueError, match="it has: none"):
        make_store(tmp_path / "empty").tensors["head"]


def test_nothing_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    make_store(tmp_path, tensors=TENSORS)
    read: list[str] = []
    real = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda self, name, *limit: (read.append(name), real(self, name, *limit))[1])
    tensors = CacheReader(tmp_path).tensors
    assert ("head" in tensors, list(tensors)) == (True, ["head", "slice.weight"])
    assert not [name for name in read if name.startswith("tensors/")]
    assert tensors["head"].shape == (3, 4)
    assert [name for name in read if name.startswith("tensors/")] == [named(tmp_path, "head")]


def test_a_tensor_that_was_read_cannot_be_written_into(tmp_path):
    head = make_store(tmp_path, tensors=TENSORS).tensors["head"]
    with pytest.raises(ValueError, match="read-only"):
        head[0] = 1


def test_a_large_tensor_is_copied_once_to_be_written_and_not_at_all_once_read(tmp_path):
    array = np.zeros((4096, 2048), np.float32)
    storage = LocalStorage(tmp_path)

    def peak(work: Callable[[], object]) -> float:
        tracemalloc.start()
        work()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most / array.nbytes

    assert peak(lambda: write_tensors(storage, {"large": array})) < 1.1
    (large,) = write_tensors(storage, {"large": array}).values()
    assert peak(lambda: read_tensor(storage, large)) < 1.1


def test_what_is_dear_to_make_is_made_once(tmp_path):
    first, second = CountedSource(), CountedSource(OTHER)
    store = make_store(tmp_path, tensors=first)
    resumed = make_store(tmp_path, tensors=second)
    assert (first.calls, second.calls) == (1, 0)
    assert resumed.manifest == store.manifest
    assert_same(resumed.tensors, TENSORS)


@pytest.mark.parametrize("tensors", [OTHER, {}, {"more": np.zeros(3, "f4")}])
def test_the_tensors_that_are_there_are_adopted_not_compared(tmp_path, tensors):
    make_store(tmp_path, tensors=TENSORS)
    before = contents(open_storage(tmp_path))
    assert_same(make_store(tmp_path, tensors=tensors).tensors, TENSORS)
    assert contents(open_storage(tmp_path)) == before


def test_another_fingerprint_is_refused_before_anything_is_made(tmp_path):
    make_store(tmp_path, tensors=TENSORS)
    source = CountedSource()
    with pytest.raises(FingerprintMismatchError):
        make_store(tmp_path, spec=CacheSpec(SPEC.fields, {}), tensors=source)
    assert source.calls == 0


def test_of_two_runs_the_one_that_is_ready_first_wins_and_the_other_writes_nothing(tmp_path):
    late = CountedSource(OTHER, before=lambda: make_store(tmp_path, tensors=TENSORS))
    store = make_store(tmp_path, tensors=late)
    assert late.calls == 1
    assert_same(store.tensors, TENSORS)
    assert len(objects(tmp_path)) == 2


def race(url) -> CacheStore:
    """Another run writes its manifest after this one has written its tensors: the worst order."""
    storage = open_storage(url)
    real, kind = type(storage).write, type(storage)
    with pytest.MonkeyPatch.context() as patch:

        def late(self: Storage, name: str, data: bytes) -> bool:
            if name == "cache.json":
                patch.undo()
                make_store(url, tensors=TENSORS)
            return real(self, name, data)

        patch.setattr(kind, "write", late)
        return make_store(url, tensors=OTHER)


def test_of_two_runs_that_write_at_once_one_wins_and_the_orphans_of_the_other_are_swept(url, monkeypatch):
    store = race(url)
    assert_same(store.tensors, TENSORS)
    orphans = sorted(set(objects(url)) - {entry.object for entry in store.manifest.tensors.values()})
    assert len(orphans) == 2
    report = verify(url)
    assert (report.problems, sorted(report.strays)) == ([], orphans)
    assert store.sweep(min_age_s=3600) == []
    assert sorted(store.sweep(min_age_s=0)) == orphans
    assert_same(store.tensors, TENSORS)
    assert (verify(url).problems, verify(url).strays) == ([], [])


def test_repair_sweeps_old_orphans(tmp_path):
    store = race(tmp_path)
    orphans = set(objects(tmp_path)) - {entry.object for entry in store.manifest.tensors.values()}
    assert repair(tmp_path).removed == []
    assert set(repair(tmp_path, min_age_s=0).removed) == orphans


def test_a_damaged_leftover_is_not_taken_for_the_tensor(tmp_path):
    make_store(tmp_path, tensors=TENSORS)
    storage = open_storage(tmp_path)
    storage.delete("cache.json")
    flip(storage, named(tmp_path, "head"))
    assert_same(make_store(tmp_path, tensors=TENSORS).tensors, TENSORS)


def test_tensors_that_cannot_be_made_leave_no_cache(tmp_path):
    def fail() -> dict[str, np.ndarray]:
        raise ValueError("no calibration data")

    with pytest.raises(ValueError, match="no calibration data"):
        make_store(tmp_path / "cache", tensors=fail)
    assert not (tmp_path / "cache").exists()


DAMAGES: dict[str, Callable[[Storage, str], object]] = {
    "a bit in the header": lambda s, name: flip(s, name, 0.05),
    "a bit in the values": lambda s, name: flip(s, name, 0.95),
    "cut off": lambda s, name: overwrite(s, name, s.read(name)[:-1]),
    "empty": lambda s, name: overwrite(s, name, b""),
    "longer": lambda s, name: overwrite(s, name, s.read(name) + b"x"),
    "lost": lambda s, name: s.delete(name),
    "another's bytes": lambda s, name: overwrite(s, name, s.read(named(s.url, "slice.weight"))),
}


@pytest.mark.parametrize(
    "kind", [*list(DAMAGES)[:2], *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(DAMAGES)[2:])]
)
def test_damage_is_named_refused_by_readers_and_beyond_repair(url, kind):
    name = named(full_cache(url).url, "head")
    storage = open_storage(url)
    DAMAGES[kind](storage, name)
    (problem,) = verify(url).problems
    assert (problem.objects, problem.keys, problem.beyond_repair) == ((name,), (), True)
    quick = [problem.objects for problem in verify(url, quick=True).problems]
    assert quick == ([] if kind.startswith("a bit") else [(name,)])
    way_out = rf"tensor 'head' of the cache at .*{name}: .*cannot be rebuilt.*restore it from a copy, or write a new cache"
    with pytest.raises(DamagedTensorError, match=way_out):
        CacheReader(url).tensors["head"]
    assert_same(
        Tensors(storage, {"slice.weight": open_store(url).manifest.tensors["slice.weight"]}),
        {"slice.weight": TENSORS["slice.weight"]},
    )
    before = contents(storage)
    with pytest.raises(ValueError, match=way_out):
        repair(url)
    assert contents(storage) == before


def test_the_content_digest_depends_on_every_tensor_and_its_name(tmp_path):
    head = TENSORS["head"]
    sources = [
        {},
        {"a": head},
        {"b": head},
        {"a": head + 1},
        {"a": head.reshape(4, 3)},
        {"a": head.view("<i4")},
        {"a": head, "b": head},
    ]
    digests = set()
    for i, tensors in enumerate(sources):
        digests |= {
            verify(fill(make_store(tmp_path / f"{i}{f}", 2, shard_format=f, tensors=tensors)).url).content_sha256
            for f in ("zarr", "webdataset")
        }
    assert len(digests) == len(sources)


def test_a_conversion_takes_the_tensors_along(tmp_path, shard_format):
    source = full_cache(tmp_path / "a", shard_format=shard_format)
    target = convert(source.url, tmp_path / "b")
    assert_same(target.tensors, TENSORS)
    assert {name: contents(source)[name] for name in objects(source.url)} == {
        name: contents(target.storage)[name] for name in objects(target.url)
    }


def test_rows_are_not_converted_into_a_cache_of_other_tensors(tmp_path):
    source = full_cache(tmp_path / "a")
    target = make_store(tmp_path / "b", shard_format="zarr", tensors=OTHER)
    with pytest.raises(ValueError, match=r"has other tensors than .*Convert to another folder or URL"):
        convert(source.url, target.url)
    assert target.pending() == [0, 1, 2]


def test_a_damaged_tensor_stops_a_conversion_before_there_is_a_cache(tmp_path):
    source = full_cache(tmp_path / "a")
    flip(source, named(source.url, "head"))
    with pytest.raises(DamagedTensorError):
        convert(source.url, tmp_path / "b")
    assert not (tmp_path / "b" / "cache.json").exists()


def test_status_counts_their_bytes(tmp_path):
    storage = full_cache(tmp_path)
    status = open_store(tmp_path).status()
    assert status.tensor_bytes == sum(storage.size(name) for name in objects(tmp_path))
    shards = sum(record.bytes for record in status.records.values())
    assert status.total_bytes == shards + status.tensor_bytes


def _head(reader: CacheReader) -> list[float]:
    return reader.tensors["head"].ravel().tolist()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reader_takes_its_tensors_to_another_process_unread(tmp_path, method):
    reader = CacheReader(full_cache(tmp_path).url)
    expected, size = _head(reader), len(pickle.dumps(reader))
    assert in_process(method, _head, reader) == expected
    assert len(pickle.dumps(reader)) == size


def test_rows_and_tensors_are_read_side_by_side(tmp_path):
    reader = CacheReader(full_cache(tmp_path).url)
    keys = [key_of(i) for i in (0, 5, 9)]
    for row, name in zip(reader.rows(keys), itertools.cycle(TENSORS), strict=False):
        assert row.key in keys
        assert np.array_equal(reader.tensors[name], TENSORS[name])
