"""Work beside the forward pass: in order, within bounds, its errors not lost."""

from __future__ import annotations

import threading

import pytest

from alignkd.pipeline.runtime.signals import Interrupted
from alignkd.pipeline.stage_one import prefetch as host_work
from alignkd.pipeline.stage_one.prefetch import HostThreads


def test_what_is_prepared_ahead_comes_in_the_order_of_the_items():
    second_is_done = threading.Event()

    def prepare(item):
        if item == 0:
            assert second_is_done.wait(10)
        if item == 1:
            second_is_done.set()
        return item * 10

    with HostThreads(readers=2) as host:
        assert list(host.prefetch(range(7), prepare, 3)) == [0, 10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize("count", [1, 3])
def test_no_more_is_prepared_ahead_than_asked_for(count):
    begun = []
    with HostThreads(readers=8) as host:
        for used, _ in enumerate(host.prefetch(range(20), begun.append, count)):
            assert len(begun) <= used + 1 + count
    assert sorted(begun) == list(range(20))


def test_no_items_are_no_work():
    with HostThreads(readers=1) as host:
        assert list(host.prefetch([], pytest.fail, 3)) == []


def test_an_error_while_preparing_comes_at_the_item_it_belongs_to():
    def prepare(item):
        if item == 2:
            raise ValueError("item 2 cannot be read")
        return item

    with HostThreads(readers=2) as host:
        coming = host.prefetch(range(5), prepare, 3)
        assert [next(coming), next(coming)] == [0, 1]
        with pytest.raises(ValueError, match="item 2 cannot be read"):
            next(coming)


def test_writes_behind_happen_one_at_a_time_in_order_and_all_before_the_end():
    written, at_once = [], []

    def write(number):
        at_once.append(number)
        assert len(at_once) == 1
        written.append(number)
        at_once.remove(number)

    with HostThreads(readers=1) as host:
        for number in range(20):
            host.write_behind(lambda number=number: write(number))
    assert written == list(range(20))


def test_who_writes_faster_than_the_storage_waits(monkeypatch):
    monkeypatch.setattr(host_work, "_MAX_WRITES", 2)
    first, go_on = threading.Event(), threading.Event()
    accepted = []

    def caller(host):
        for number in range(5):
            host.write_behind(lambda: first.set() or go_on.wait(10))
            accepted.append(number)

    with HostThreads(readers=1) as host:
        thread = threading.Thread(target=caller, args=(host,))
        thread.start()
        assert first.wait(10)
        thread.join(0.1)
        assert len(accepted) <= 2
        go_on.set()
        thread.join(10)
    assert accepted == [0, 1, 2, 3, 4]


def test_the_error_of_a_write_is_raised_at_a_later_call_and_ends_the_job():
    failed = threading.Event()

    def fail():
        failed.set()
        raise OSError("disk full")

    def job(host):
        host.write_behind(fail)
        assert failed.wait(10)
        for _ in range(50):
            host.write_behind(lambda: None)
        pytest.fail("fifty writes after an error")

    with pytest.raises(OSError, match="disk full"), HostThreads(readers=1) as host:
        job(host)


@pytest.mark.parametrize("flush", [True, False])
def test_the_error_of_the_last_write_is_raised_at_the_end(flush):
    go_on = threading.Event()

    def fail():
        go_on.wait(10)
        raise OSError("disk full")

    def job(host):
        host.write_behind(fail)
        go_on.set()
        if flush:
            host.flush()

    with pytest.raises(OSError, match="disk full"), HostThreads(readers=1) as host:
        job(host)


def test_what_was_begun_is_finished_when_the_job_is_interrupted():
    written, go_on = [], threading.Event()

    def interrupted(host):
        host.write_behind(lambda: written.append(go_on.wait(10)))
        host.write_behind(lambda: written.append(2))
        go_on.set()
        raise Interrupted("stopped")

    with pytest.raises(Interrupted), HostThreads(readers=1) as host:
        interrupted(host)
    assert written == [True, 2]


def test_the_error_that_ended_the_job_is_not_hidden_by_one_of_a_write():
    go_on = threading.Event()

    def fail():
        go_on.wait(10)
        raise OSError("disk full")

    def job(host):
        host.write_behind(fail)
        go_on.set()
        raise ValueError("the reason")

    with pytest.raises(ValueError, match="the reason"), HostThreads(readers=1) as host:
        job(host)
