"""The bar, on a terminal and in a log file, and the signals that end a job at a safe point."""

from __future__ import annotations

import io
import logging
import os
import signal
import threading

import pytest
from rich.console import Console

from alignkd.pipeline.runtime import progress as progress_module
from alignkd.pipeline.runtime.progress import progress_bar
from alignkd.pipeline.runtime.signals import Interrupted, stop_on_signals


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes when it is told to."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def console(monkeypatch, terminal):
    made = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    monkeypatch.setattr(progress_module, "stderr_console", made)
    return made


def lines(log):
    return [record.getMessage() for record in log.records]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_log_gets_a_line_now_and_then_and_one_at_the_end(clock, monkeypatch, caplog, terminal):
    caplog.set_level(logging.INFO, "alignkd.pipeline.runtime.progress")
    console(monkeypatch, terminal)
    with progress_bar("cache-teacher 3/8", 1000, "samples") as progress:
        for _ in range(100):
            clock.now += 1.0
            progress.advance(2)
            progress.note("5,000 positions/s")
        assert lines(caplog) == [
            "cache-teacher 3/8: 60 of 1,000 samples, 2.0/s, 470 s left; 5,000 positions/s",
            "cache-teacher 3/8: 120 of 1,000 samples, 2.0/s, 440 s left; 5,000 positions/s",
            "cache-teacher 3/8: 180 of 1,000 samples, 2.0/s, 410 s left; 5,000 positions/s",
        ]
    assert lines(caplog)[3:] == ["cache-teacher 3/8: 200 samples done in 100 s; 5,000 positions/s"]


def test_what_was_done_before_does_not_count_for_the_rate(clock, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "alignkd.pipeline.runtime.progress")
    console(monkeypatch, terminal=False)
    with progress_bar("distill", 100, "steps", done=40) as progress:
        clock.now += 30
        progress.advance(30)
        assert lines(caplog) == ["distill: 70 of 100 steps, 1.0/s, 30 s left"]


def test_a_terminal_gets_a_bar(clock, monkeypatch):
    terminal = console(monkeypatch, terminal=True)
    with progress_bar("verify", 10, "shards") as progress:
        clock.now += 100
        progress.advance(4)
    assert "verify" in terminal.file.getvalue()
    assert "4/10" in terminal.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_that_is_not_shown_says_nothing(clock, monkeypatch, caplog, terminal):
    caplog.set_level(logging.INFO, "alignkd.pipeline.runtime.progress")
    hidden = console(monkeypatch, terminal)
    with progress_bar("cache-teacher", 10, "samples", show=False) as progress:
        clock.now += 100
        progress.advance(4)
        assert progress.seconds == 100
    assert hidden.file.getvalue().strip() == ""
    assert lines(caplog) == []


def test_nothing_is_drawn_where_there_is_no_terminal(clock, monkeypatch):
    plain = console(monkeypatch, terminal=False)
    with progress_bar("verify", 10, "shards") as progress:
        progress.advance(10)
    assert plain.file.getvalue() == ""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_kept_until_the_next_safe_point(name):
    before = signal.getsignal(signal.Signals[name])
    with stop_on_signals() as stop:
        stop.check()
        os.kill(os.getpid(), signal.Signals[name])
        assert stop
        with pytest.raises(Interrupted, match=f"stopped by {name}; run the same command again to continue"):
            stop.check()
    assert signal.getsignal(signal.Signals[name]) == before


def test_the_second_interrupt_from_the_keyboard_does_not_wait():
    with stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_thread_leaves_signals_to_the_process_it_is_part_of():
    def job():
        with stop_on_signals() as stop:
            handlers.append((signal.getsignal(signal.SIGTERM), bool(stop)))

    handlers = [(signal.getsignal(signal.SIGTERM), False)]
    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert handlers[0] == handlers[1]
