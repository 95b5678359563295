"""What ``alignkd cache status`` says: within 80 columns, in words, with every worker, alive or gone."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from tiny_runs import IMAGES, TEACHER, numbered, wait_until, write_cache, write_data

from alignkd.cache_store.protocol.store import open_store
from alignkd.cache_store.protocol.worker_reports import new_reporter, read_reports, sweep_reports
from alignkd.cache_store.storage import open_storage
from alignkd.cli import main
from alignkd.errors import CacheError
from alignkd.pipeline.cache_admin import status as status_module
from alignkd.pipeline.cache_admin.status import figures_at
from alignkd.pipeline.cache_admin.workers import MISSED_S, SILENT_S, worker_figures
from alignkd.pipeline.commands.output.status_table import duration
from alignkd.pipeline.runtime.ranks import Worker
from alignkd.pipeline.stage_one.heartbeat import heartbeat


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("status")
    write_cache(write_data(folder / "d.json", numbered(6)), folder / "cache")
    return folder / "cache"


def shown(cache):
    result = CliRunner().invoke(main, ["cache", "status", str(cache)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def silence(cache, seconds):
    """Make every report of a cache as old as this."""
    for path in (cache / "workers").iterdir():
        os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_no_line_is_wider_than_80_columns_and_nothing_is_none(cache):
    words = shown(cache)
    assert max(map(len, words.splitlines())) <= 80
    assert "None" not in words
    for name in ("tail_logmass", "topk_rank_steps", "vision_tokens"):
        assert name not in words


def test_each_worker_is_shown_with_its_host_and_how_its_work_ended(cache):
    (worker,) = figures_at(str(cache))["workers"]
    assert (worker["worker"], worker["host"], worker["pid"]) == ("0/1", platform.node(), os.getpid())
    assert (worker["state"], worker["samples"]) == ("done", 6)
    assert worker["seconds_since_commit"] >= 0
    assert platform.node()[:8] in shown(cache)


@pytest.mark.parametrize(("age_s", "state"), [(SILENT_S / 2, "writing"), (SILENT_S * 2, "gone")])
def test_a_worker_that_falls_silent_at_work_is_gone(tmp_path, age_s, state):
    new_reporter(open_storage(tmp_path), "3/8", "node-7", 4711).write("writing", 12)
    silence(tmp_path, age_s)
    (worker,) = worker_figures([], read_reports(open_storage(tmp_path)), now=time.time(), recent_s=600)
    assert (worker["worker"], worker["host"], worker["state"]) == ("3/8", "node-7", state)


def test_a_worker_of_this_host_without_a_process_is_gone_after_one_missed_report(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid, age_s, state in [
        (ended.pid, 0, "writing"),
        (ended.pid, MISSED_S + 5, "gone"),
        (os.getpid(), MISSED_S + 5, "writing"),
    ]:
        folder = tmp_path / f"{pid}-{age_s}"
        new_reporter(open_storage(folder), "0/1", platform.node(), pid).write("writing", 12)
        silence(folder, age_s)
        (worker,) = worker_figures([], read_reports(open_storage(folder)), now=time.time(), recent_s=600)
        assert worker["state"] == state, (pid, age_s)


@pytest.mark.parametrize("state", ["done", "stopped", "failed"])
def test_a_worker_that_ended_is_never_gone(tmp_path, state):
    new_reporter(open_storage(tmp_path), "0/1", "node-7", 4711).write(state, 12)
    silence(tmp_path, SILENT_S * 9)
    (worker,) = worker_figures([], read_reports(open_storage(tmp_path)), now=time.time(), recent_s=600)
    assert worker["state"] == state


def test_during_calibration_status_says_so(tmp_path):
    with heartbeat(str(tmp_path / "cache"), Worker()) as beat:
        beat.enter("calibrating")
        assert "calibrating" in shown(tmp_path / "cache")
        assert figures_at(str(tmp_path / "cache"))["workers_at_work"] == 1
    assert "ended before the first shard" in shown(tmp_path / "cache")


def test_a_command_that_is_refused_leaves_no_report(tmp_path):
    with heartbeat(str(tmp_path / "cache"), Worker()):
        pass
    assert not (tmp_path / "cache").exists()
    with pytest.raises(CacheError):
        figures_at(str(tmp_path / "cache"))


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"worker": 1}', b"\xff", b"[" * 5_000, b'{"worker": "0/1"}' * 1000])
def test_a_report_that_is_none_hides_no_worker_and_harms_nobody(tmp_path, content):
    storage = open_storage(tmp_path)
    new_reporter(storage, "0/1", "node", 1).write("writing", 0)
    (tmp_path / "workers" / f"{'a' * 16}-00000003.json").write_bytes(content)
    (tmp_path / "workers" / "notes.txt").write_bytes(content)
    assert [one.report.host for one in read_reports(storage)] == ["node"]


def test_old_reports_are_swept_and_what_is_no_report_stays(tmp_path):
    storage = open_storage(tmp_path)
    new_reporter(storage, "0/1", "node", 1).write("done", 0)
    (tmp_path / "workers" / "notes.txt").write_text("mine")
    silence(tmp_path, 1000)
    sweep_reports(storage, min_age_s=2000)
    assert len(read_reports(storage)) == 1
    sweep_reports(storage, min_age_s=500)
    assert [path.name for path in (tmp_path / "workers").iterdir()] == ["notes.txt"]


def test_a_deleted_shard_is_missing(tmp_path):
    write_cache(write_data(tmp_path / "d.json", numbered(6)), tmp_path / "cache")
    record = open_store(tmp_path / "cache").status().records[1]
    (tmp_path / "cache" / record.object).unlink()
    assert figures_at(str(tmp_path / "cache"))["shards_missing"] == [1]
    words = shown(tmp_path / "cache")
    assert "1 committed shard missing (000001)" in words
    assert f"alignkd cache repair {tmp_path / 'cache'}" in words.replace("\n", "")


def test_without_a_worker_no_time_left_is_promised(tmp_path):
    write_cache(write_data(tmp_path / "d.json", numbered(6)), tmp_path / "cache")
    (tmp_path / "cache" / "commits" / "000002.json").unlink()
    words = shown(tmp_path / "cache")
    assert "no worker is at work" in words
    assert "left at this rate" not in words


def test_watch_ends_when_the_cache_is_complete(cache, monkeypatch):
    complete = status_module.figures_at(str(cache))
    looks = iter([{**complete, "complete": False}, {**complete, "complete": False}, complete])
    monkeypatch.setattr(status_module, "figures_at", lambda _: next(looks))
    result = CliRunner().invoke(main, ["cache", "status", str(cache), "--watch", "--every", "0.1", "--json"])
    assert [json.loads(line)["complete"] for line in result.stdout.splitlines()] == [False, False, True]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (12_000, "3 h 20 min"), (200_000, "2 d 7 h")],
)
def test_times_are_in_their_two_largest_units(seconds, words):
    assert duration(seconds) == words


@pytest.mark.processes
def test_a_killed_worker_is_known_by_its_silence(door, tmp_path):
    data = write_data(tmp_path / "d.json", numbered(400))
    machine = ["--images", IMAGES, "--device", "cpu", "--shard-samples", 2]
    running = door.start("cache-teacher", "--teacher", TEACHER, "--data", data, "--cache", tmp_path / "cache", *machine)
    wait_until(lambda: len(list((tmp_path / "cache" / "commits").glob("0*.json"))) >= 2)
    assert [worker["state"] for worker in figures_at(str(tmp_path / "cache"))["workers"]] == ["writing"]
    os.kill(running.pid, signal.SIGKILL)
    running.finish()
    silence(tmp_path / "cache", 2 * SILENT_S)
    assert [worker["state"] for worker in figures_at(str(tmp_path / "cache"))["workers"]] == ["gone"]
    assert "no worker is at work" in shown(tmp_path / "cache")
