"""Repair and convert killed at any step: another run ends where one that was not killed would have."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal

import pytest
from cache_samples import all_names, fill, flip, full_cache
from damages import DAMAGES

from alignkd.cache_store.protocol.maintenance.convert import convert
from alignkd.cache_store.protocol.maintenance.repair import repair
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.store import open_store
from alignkd.cache_store.storage.local import LocalStorage

pytestmark = pytest.mark.processes


def killed(call, counted, at):
    """Run ``call`` in a process that is killed with -9 at the ``at``-th call of ``counted``; False if it ended before."""

    def child():
        calls = itertools.count(1)
        owner, name = counted
        real = getattr(owner, name)

        def dying(*arguments, **options):
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(owner, name, dying)
        call()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("counted", [(os, "fsync"), (os, "link"), (LocalStorage, "write")], ids=["fsync", "link", "write"])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 8])
def test_a_conversion_that_was_killed_is_finished_by_another(tmp_path, counted, at):
    full_cache(tmp_path / "source")
    expected = verify(tmp_path / "source")
    assert killed(lambda: convert(tmp_path / "source", tmp_path / "target"), counted, at)
    convert(tmp_path / "source", tmp_path / "target")
    report = verify(tmp_path / "target")
    assert (report.problems, report.incomplete, report.content_sha256) == ([], 0, expected.content_sha256)
    repair(tmp_path / "target", min_age_s=0)
    assert verify(tmp_path / "target").strays == []
    assert verify(tmp_path / "source") == expected


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_a_repair_that_was_killed_is_finished_by_another(tmp_path, at):
    storage = full_cache(tmp_path)
    whole = verify(tmp_path).content_sha256
    for kind in ("a bit in a shard", "an empty record", "a bit in the record of a run"):
        DAMAGES[kind][2](storage)
    storage.write("commits/.tmp-0123456789abcdef", b"half")
    assert killed(lambda: repair(tmp_path, min_age_s=0), (LocalStorage, "delete"), at)
    repair(tmp_path, min_age_s=0)
    fill(open_store(tmp_path), reject=(4,))
    report = verify(tmp_path)
    assert (report.problems, report.strays, report.content_sha256) == ([], [], whole)


def test_a_conversion_of_damage_leaves_what_was_whole_and_goes_on_after_a_repair(tmp_path):
    source = full_cache(tmp_path / "source")
    name = sorted(name for name in all_names(source) if name.startswith("shards/"))[1]
    before = source.read(name)
    flip(source, name)
    with pytest.raises(ValueError, match="shard 1 "):
        convert(tmp_path / "source", tmp_path / "target")
    assert verify(tmp_path / "target").problems == []
    source.delete(name)
    source.write(name, before)
    convert(tmp_path / "source", tmp_path / "target")
    assert verify(tmp_path / "target").content_sha256 == verify(tmp_path / "source").content_sha256
