"""A cache that grows: further plans are frozen beside the first one, and its content is that of a cache written at once."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from cache_samples import SPEC, TENSORS, full_cache, key_of, make_row
from grown_caches import (
    PLACES,
    cache_of,
    content,
    fill_numbers,
    grow,
    lacking,
    objects_below,
    place,
    plan_of_numbers,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache_killed import killed

from alignkd.cache_store.errors import FingerprintMismatchError
from alignkd.cache_store.protocol.further_plans import freeze
from alignkd.cache_store.protocol.maintenance.append import append_plan
from alignkd.cache_store.protocol.maintenance.convert import convert
from alignkd.cache_store.protocol.maintenance.repair import repair
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.names import further_plan_name
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import CacheStore, open_store
from alignkd.cache_store.storage.local import LocalStorage
from alignkd.errors import CacheError

_URLS = iter(range(10_000))


@pytest.mark.parametrize(("where", "shard_format"), [*PLACES[:2], pytest.param(*PLACES[2], marks=pytest.mark.slow), PLACES[3]])
def test_an_appended_cache_has_the_content_of_one_written_at_once(request, tmp_path, where, shard_format):
    url = place(request, tmp_path, where)
    cache_of(url, range(6), shard_format=shard_format, reject=(4,))
    before = objects_below(url, "shards", "commits", "plan")
    grow(url, range(4, 15), reject=(4, 9))
    expected = content(cache_of(tmp_path / "at-once", range(15), shard_format=shard_format, reject=(4, 9)))
    assert content(url) == expected
    assert before.items() <= objects_below(url, "shards", "commits", "plan").items()
    reader = CacheReader(url)
    assert list(reader) == [key_of(i) for i in range(15) if i not in (4, 9)]
    assert set(reader.rejected) == {key_of(4), key_of(9)}
    rows = list(reader.rows(reversed(list(reader))))
    assert [row.sample_id for row in rows] == [make_row(i).sample_id for i in reversed(range(15)) if i not in (4, 9)]
    assert reader.first_dimensions("token_ids").tolist() == [
        -1 if i in (4, 9) else len(make_row(i).values["token_ids"]) for i in range(15)
    ]
    status = open_store(url).status()
    assert (status.complete, status.shards, status.samples, status.samples_done) == (True, 5, 15, 13)


@settings(max_examples=6, deadline=None)
@given(
    order=st.permutations(range(14)),
    cuts=st.lists(st.integers(1, 13), max_size=3).map(lambda cuts: sorted({0, *cuts, 14})),
    sizes=st.lists(st.integers(1, 6), min_size=4, max_size=4),
    overlap=st.integers(0, 5),
)
def test_any_split_of_the_samples_gives_the_content_of_one_written_at_once(order, cuts, sizes, overlap):
    url = f"memory://append-{next(_URLS)}/cache"
    cache_of(url, order[: cuts[1]], shard_samples=sizes[0])
    for size, start, stop in zip(sizes[1:], cuts[1:], cuts[2:], strict=False):
        grow(url, order[max(0, start - overlap) : stop], shard_samples=size)
    assert content(url) == content(cache_of(f"{url}-at-once", range(14)))


def test_a_cache_that_nobody_appended_to_keeps_its_bytes_and_version(tmp_path):
    full_cache(tmp_path)
    before = objects_below(tmp_path, "plan"), (tmp_path / "cache.json").read_bytes()
    assert json.loads(before[1])["format_version"] == 3
    assert append_plan(tmp_path, lacking(range(10))).plan.samples == 10
    assert (objects_below(tmp_path, "plan"), (tmp_path / "cache.json").read_bytes()) == before


def test_a_grown_cache_has_another_version_and_the_manifest_is_otherwise_as_it_was(tmp_path):
    cache_of(tmp_path, range(4))
    before = json.loads((tmp_path / "cache.json").read_text())
    grow(tmp_path, range(8))
    grow(tmp_path, range(12))
    after = json.loads((tmp_path / "cache.json").read_text())
    assert (before.pop("format_version"), after.pop("format_version")) == (3, 4)
    assert before.pop("sha256") != after.pop("sha256")
    assert before == after
    assert sorted(path.name for path in (tmp_path / "plan").glob("*.json")) == ["000001.json", "000002.json"]


@pytest.mark.parametrize("where", ["local", pytest.param("s3", marks=pytest.mark.slow)])
def test_two_appends_at_once_both_get_their_samples_and_none_twice(request, tmp_path, where):
    url = place(request, tmp_path, where)
    cache_of(url, range(4))
    at_once, stores = threading.Barrier(3), []

    def work(numbers):
        asked = []

        def further(plan):
            asked.append(1)
            if len(asked) == 1:
                at_once.wait(60)  # all of them have read the same plan
            return lacking(numbers)(plan)

        stores.append(append_plan(url, further))

    threads = [threading.Thread(target=work, args=(part,)) for part in (range(2, 10), range(6, 14), range(2, 10))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(stores) == 3
    assert len(open_store(url).plan.parts) == 3
    fill_numbers(open_store(url))
    assert content(url) == content(cache_of(tmp_path / "at-once", range(14)))


def test_a_worker_of_the_first_plan_goes_on_with_its_own_shards(tmp_path):
    first = plan_of_numbers(range(10))
    worker = CacheStore.create_or_open(tmp_path, SPEC, first, shard_format="zarr", tensors=TENSORS)
    fill_numbers(worker, shards=[0])
    other = append_plan(tmp_path, lacking(range(14)))
    fill_numbers(other, shards=[3])
    assert (worker.pending(), other.pending()) == ([1, 2], [1, 2])
    fill_numbers(worker)
    late = CacheStore.create_or_open(tmp_path, SPEC, first, shard_format="zarr")
    assert (worker.pending(), other.pending(), late.pending()) == ([], [], [])
    assert content(tmp_path) == content(cache_of(tmp_path / "at-once", range(14), shard_format="zarr"))


def test_other_data_is_refused_and_the_message_names_the_way_to_append(tmp_path):
    spec = type(SPEC)(SPEC.fields, {**SPEC.fingerprint, "data": "1"})
    cache_of(tmp_path, range(4), spec=spec)
    with pytest.raises(FingerprintMismatchError, match="alignkd cache append"):
        cache_of(tmp_path, range(8), spec=type(SPEC)(SPEC.fields, {**SPEC.fingerprint, "data": "2"}))


def test_a_sample_that_two_plans_name_is_refused(tmp_path):
    cache_of(tmp_path, range(4))
    grow(tmp_path, range(6))
    assert freeze(open_store(tmp_path).storage, 2, plan_of_numbers([3, 9]))
    with pytest.raises(CacheError, match="repeated: plan identical samples once"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: (folder / "000001.json").unlink(), "but not plan/000001.json"),
        (lambda folder: (folder / "000001.json").write_text("{}"), "000001.json: not a further plan"),
        (lambda folder: (folder / "000001.json").write_text((folder / "000001.json").read_text() + " "), "checksum"),
        (lambda folder: [path.unlink() for path in folder.glob("keys-*.npy")], "keys-"),
    ],
)
def test_damage_of_a_further_plan_is_refused_as_a_whole_and_nothing_is_removed(tmp_path, damage, why):
    cache_of(tmp_path, range(4))
    grow(tmp_path, range(8))
    grow(tmp_path, range(12))
    damage(tmp_path / "plan")
    before = objects_below(tmp_path, "shards", "commits", "plan")
    for command in (verify, repair, CacheReader):
        with pytest.raises(CacheError, match=why):
            command(tmp_path)
    assert objects_below(tmp_path, "shards", "commits", "plan") == before


def test_arrays_of_an_append_that_came_second_are_strays_and_are_swept_when_they_are_old(tmp_path):
    cache_of(tmp_path, range(4))
    store = grow(tmp_path, range(8))
    plan_of_numbers(range(30, 40)).write(store.storage)
    (stray,) = verify(tmp_path).strays
    assert stray.startswith("plan/keys-")
    assert verify(tmp_path).problems == []
    assert repair(tmp_path).removed == []
    assert repair(tmp_path, min_age_s=0).removed == [stray]
    os.utime(tmp_path / further_plan_name(1), (time.time() - 1e6,) * 2)
    assert repair(tmp_path).removed == []
    assert content(tmp_path) == content(cache_of(tmp_path / "at-once", range(8)))


def test_a_damaged_shard_of_appended_samples_is_made_again(tmp_path):
    cache_of(tmp_path, range(4))
    grow(tmp_path, range(8))
    whole = content(tmp_path)
    (name,) = [path for path in (tmp_path / "shards").iterdir() if path.name.startswith("000001")]
    name.write_bytes(b"")
    report = repair(tmp_path)
    assert (report.shards_to_do, len(report.problems)) == (1, 1)
    fill_numbers(append_plan(tmp_path, lacking(range(8))))
    assert content(tmp_path) == whole


def test_rejected_samples_that_were_appended_are_tried_again(tmp_path):
    cache_of(tmp_path, range(4))
    grow(tmp_path, range(8), reject=(6,))
    assert repair(tmp_path, retry=[]).samples_to_retry == {"too long": 1}
    fill_numbers(open_store(tmp_path))
    assert content(tmp_path) == content(cache_of(tmp_path / "at-once", range(8)))


def test_a_grown_cache_is_converted_again_after_it_grew(tmp_path, shard_format):
    source, target = tmp_path / "source", tmp_path / "target"
    cache_of(source, range(5), shard_format=shard_format)
    convert(source, target)
    grow(source, range(9))
    grow(source, range(14), shard_samples=2)
    convert(source, target)
    assert content(target) == content(source)
    assert [p.summary() for p in open_store(target).plan.parts] == [p.summary() for p in open_store(source).plan.parts]
    back = convert(target, tmp_path / "back")
    assert objects_below(back.url, "shards", "plan") == objects_below(source, "shards", "plan")
    grow(target, range(16))
    grow(source, range(17))
    with pytest.raises(CacheError, match="other appended samples"):
        convert(source, target)


@pytest.mark.processes
@pytest.mark.parametrize("counted", [(os, "fsync"), (os, "link"), (LocalStorage, "write")], ids=["fsync", "link", "write"])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_an_append_that_was_killed_is_finished_by_another(tmp_path, counted, at):
    cache = tmp_path / "cache"
    cache_of(cache, range(6))
    assert killed(lambda: grow(cache, range(15)), counted, at)
    assert verify(cache).problems == []
    grow(cache, range(15))
    expected = content(cache_of(tmp_path / "at-once", range(15)))
    assert content(cache) == expected
    assert len(open_store(cache).plan.parts) == 2
    repair(cache, min_age_s=0)
    assert (verify(cache).strays, content(cache)) == ([], expected)


def test_a_cache_of_the_last_release_can_be_appended_to(tmp_path):
    released = Path(__file__).parents[1] / "data" / "cache_v3"
    shutil.copytree(released, tmp_path / "cache")
    rows = list(CacheReader(released))
    append_plan(tmp_path / "cache", lambda plan: plan_of_numbers(range(3)) if len(plan.parts) == 1 else None)
    report = verify(tmp_path / "cache")
    assert (report.problems, report.incomplete) == ([], 1)
    assert report.content_sha256 == json.loads((released / "expected.json").read_text())["content_sha256"]
    assert list(CacheReader(tmp_path / "cache")) == rows
