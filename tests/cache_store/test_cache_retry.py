"""Rejected samples are tried again without a moment in which the rows of their shard are lost."""

from __future__ import annotations

import pytest
from cache_samples import TENSORS, contents, fill, full_cache, key_of, make_row, make_store

from alignkd.cache_store.protocol.maintenance.repair import repair
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.names import object_names, record_name, retry_name
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import open_store
from alignkd.cache_store.rows.reasons import REASONS, count_reasons, reason_class
from alignkd.cache_store.storage import open_storage
from alignkd.cache_store.storage.local import LocalStorage

REJECTED_SHARD = 1
"""The shard of sample 4, which :func:`cache_samples.full_cache` rejects."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Content sha256 of a cache that never rejected a sample."""
    return verify(fill(make_store(tmp_path_factory.mktemp("whole"), tensors=TENSORS)).url).content_sha256


def test_a_retry_gives_the_content_of_a_cache_that_never_had_the_fault(url, whole):
    full_cache(url)
    assert verify(url).content_sha256 != whole
    done = repair(url, retry=())
    assert (done.problems, done.shards_to_do, sum(done.samples_to_retry.values())) == ([], 1, 1)
    assert open_store(url).pending() == [REJECTED_SHARD]
    fill(open_store(url))
    report = verify(url)
    assert (report.problems, report.rows, report.strays, report.content_sha256) == ([], 10, [], whole)
    assert (open_store(url).pending(), open_store(url).retrying()) == ([], set())


def test_the_rows_of_a_marked_shard_stay_readable_until_it_is_made_again(tmp_path):
    full_cache(tmp_path)
    before = verify(tmp_path).content_sha256
    repair(tmp_path, retry=())
    repair(tmp_path, min_age_s=0)
    open_store(tmp_path).sweep(min_age_s=0)
    assert open_store(tmp_path).pending() == [REJECTED_SHARD]
    assert verify(tmp_path).content_sha256 == before
    assert len(CacheReader(tmp_path)) == 9


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("step", range(1, 6))
def test_a_kill_at_any_step_of_the_commit_loses_no_row(tmp_path, whole, monkeypatch, step):
    full_cache(tmp_path)
    kept = verify(tmp_path).content_sha256
    repair(tmp_path, retry=())
    steps = iter(range(1, 100))

    def killing(real):
        def call(self, *arguments, **options):
            if next(steps) == step:
                raise KilledError
            return real(self, *arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("write", "replace", "delete"):
            patch.setattr(LocalStorage, name, killing(getattr(LocalStorage, name)))
        try:
            fill(open_store(tmp_path))
        except KilledError:
            open_store(tmp_path)
    # After the kill the cache is the old one or the new one, and a sweep of everything takes nothing of it away.
    open_store(tmp_path).sweep(min_age_s=0)
    assert verify(tmp_path).problems == []
    assert verify(tmp_path).content_sha256 in (kept, whole)
    fill(open_store(tmp_path))
    open_store(tmp_path).sweep(min_age_s=0)
    assert verify(tmp_path).content_sha256 == whole
    assert open_storage(tmp_path).names("retries") == []
    assert len(object_names(open_storage(tmp_path))) == open_store(tmp_path).plan.shards


def test_a_retry_that_fails_again_leaves_the_cache_as_it_was(tmp_path):
    storage = full_cache(tmp_path)
    before = {name: data for name, data in contents(storage).items() if name.startswith("shards/")}
    repair(tmp_path, retry=())
    fill(open_store(tmp_path), reject=(4,))
    assert open_store(tmp_path).pending() == []
    assert {name: data for name, data in contents(storage).items() if name.startswith("shards/")} == before


def test_the_first_of_two_workers_that_make_a_shard_again_wins(tmp_path):
    full_cache(tmp_path)
    repair(tmp_path, retry=())
    first, second = open_store(tmp_path), open_store(tmp_path)
    positions = first.plan.positions_of(REJECTED_SHARD)
    rows = [make_row(i) for i in positions]
    record = first.commit_shard(REJECTED_SHARD, rows, [])
    assert second.commit_shard(REJECTED_SHARD, rows, []) == record
    assert verify(tmp_path).problems == []


@pytest.mark.parametrize(
    "mark", [b"", b"[]", b"{}", b'{"object": 3}', b'{"object": "shards/000001-000000000000.tar"}', b"\xff"]
)
def test_a_mark_that_is_damaged_or_out_of_date_counts_nothing_and_is_removed(tmp_path, mark):
    storage = full_cache(tmp_path)
    storage.write(retry_name(REJECTED_SHARD), mark)
    store = open_store(tmp_path)
    assert (store.pending(), store.committed(REJECTED_SHARD)) == ([], True)
    store.sweep(min_age_s=3600)
    assert storage.size(retry_name(REJECTED_SHARD)) is None
    assert storage.size(record_name(REJECTED_SHARD)) is not None


def test_only_the_reasons_that_are_asked_for_are_tried_again(tmp_path):
    full_cache(tmp_path)
    (sample,) = open_store(tmp_path).status().rejected
    assert sample.key == key_of(4)
    others = [name for name in REASONS if name != reason_class(sample.reason)]
    assert repair(tmp_path, retry=others).shards_to_do == 0
    assert repair(tmp_path, retry=[reason_class(sample.reason)]).shards_to_do == 1


REASONS_SEEN = {
    "image x/1.png: No such file or directory": "image missing",
    "image missing: x/1.png": "image missing",
    "image x/1.png: not a readable image (OSError: truncated)": "image damaged",
    "image '../1.png' lies outside the image folder x": "image outside",
    "image x: 20,000 x 20,000 pixels, more than 64,000,000": "image too large",
    "image x: 300,000,000 bytes, more than the 268,435,456 an image may have": "image too large",
    "an image lies beyond the maximum length of 8 ids": "too long",
    "no supervised token within 8 ids: the answer is empty, cut off, or masked by the template": "too long",
    "no supervised token: the answer is empty": "text",
    "its text holds the special token '</s>', which the model would not read as text": "text",
    "its 40 positions do not fit into memory, even alone": "out of memory",
    "out of memory: its 40 positions do not fit into memory, even alone": "out of memory",
    "not finite: the teacher's pass over it gives NaN or infinity": "not finite",
    "": "text",
}


@pytest.mark.parametrize("reason", REASONS_SEEN)
def test_a_reason_of_any_version_has_a_class(reason):
    assert reason_class(reason) == REASONS_SEEN[reason]


def test_reasons_are_counted_the_most_frequent_first():
    counts = count_reasons(["no supervised token", "image a: No such file or directory", "image b: No such file or directory"])
    assert list(counts.items()) == [("image missing", 2), ("text", 1)]
