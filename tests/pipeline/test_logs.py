"""The log of a job: a time on every line, a start line, JSON objects, a file for each worker."""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
from datetime import UTC, datetime

import pytest
from rich.console import Console
from tiny_runs import IMAGES, SAMPLES, STUDENT, TEACHER, record, write_data

from alignkd.errors import ConfigError
from alignkd.pipeline.config.log import LogConfig
from alignkd.pipeline.runtime import progress as progress_module
from alignkd.pipeline.runtime.logs import log_start, start_logging
from alignkd.pipeline.runtime.progress import progress_bar
from alignkd.pipeline.runtime.ranks import Worker
from alignkd.version import __version__

TIMED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ (DEBUG|INFO|WARNING|ERROR|CRITICAL) ")
LOG = logging.getLogger("alignkd.test")


@pytest.fixture
def logging_to(capsys):
    """Start logging with some options; the function returned ends it and gives what standard error got."""
    stops = []

    def start(worker=None, **options):
        stops.append(start_logging(LogConfig(**options), worker or Worker()))

        def end():
            stops.pop()()
            return capsys.readouterr().err.splitlines()

        return end

    yield start
    while stops:
        stops.pop()()


def test_every_line_has_a_time_and_a_level(logging_to):
    end = logging_to()
    LOG.info("plain %d", 1)
    LOG.warning("of two\nlines")
    LOG.debug("left out")
    lines = end()
    assert [bool(TIMED.match(line)) for line in lines] == [True, True, False]
    assert lines[0].endswith(" plain 1")
    assert lines[2] == "    lines"


def test_the_level_decides_what_is_logged(logging_to):
    end = logging_to(log_level="warning")
    LOG.info("left out")
    LOG.warning("kept")
    assert [line.split()[-1] for line in end()] == ["kept"]


def test_other_libraries_are_heard_from_warnings_on_and_named(logging_to):
    end = logging_to(log_level="debug")
    logging.getLogger("botocore").info("Authorization: secret")
    logging.getLogger("botocore").warning("slow")
    warnings.warn("careful", stacklevel=1)
    lines = end()
    assert not any("secret" in line for line in lines)
    assert any(line.endswith("botocore: slow") for line in lines)
    assert any("py.warnings: " in line and "careful" in line for line in lines)


def test_a_library_that_prints_its_log_itself_is_logged_as_others_are(logging_to, capsys):
    deepspeed = logging.getLogger("DeepSpeed")
    before = (deepspeed.level, deepspeed.propagate)
    end = logging_to()
    own = logging.StreamHandler()  # as DeepSpeed does when it is imported
    deepspeed.addHandler(own)
    deepspeed.setLevel(logging.INFO)
    deepspeed.propagate = False
    try:
        deepspeed.info("chatter")
        deepspeed.warning("Setting accelerator to CPU")
        (line,) = end()
        deepspeed.warning("after the job")
    finally:
        deepspeed.removeHandler(own)
        deepspeed.level, deepspeed.propagate = before
    assert re.search(r"Z WARNING DeepSpeed: Setting accelerator to CPU$", line)


def test_lines_of_several_workers_name_host_and_rank(logging_to):
    end = logging_to(Worker(3, 8))
    LOG.info("here")
    (line,) = end()
    assert re.search(r" INFO +\S+ 3/8 here$", line)


def test_text_from_others_and_credentials_are_made_safe_in_a_line(logging_to, tmp_path):
    end = logging_to(log_file=str(tmp_path / "run.log"))
    LOG.info("sample %s of s3://user:geheim99@bucket/x", "\x1b]0;owned\x07\n2026-01-01 00:00:00Z INFO forged \ud800")
    shown = end()
    written = (tmp_path / "run.log").read_text().splitlines()
    assert written == shown
    text = "\n".join(shown)
    assert "geheim99" not in text
    assert "\\x1b]0;owned\\x07" in text
    assert sum(bool(TIMED.match(line)) for line in shown) == 1


def test_json_lines_say_who_when_and_what(logging_to, tmp_path):
    end = logging_to(Worker(1, 2), log_json=True, log_file=str(tmp_path / "logs" / "run.jsonl"))
    LOG.warning("odd \ud800\u2028\x1b id")
    try:
        raise ValueError("lost")
    except ValueError:
        LOG.exception("it ends")
    lines = end()
    assert (tmp_path / "logs" / "run.rank1.jsonl").read_text().splitlines() == lines
    first, second = map(json.loads, lines)
    assert (first["level"], first["logger"], first["message"]) == ("warning", "alignkd.test", "odd \ud800\u2028\x1b id")
    assert (first["rank"], first["world_size"]) == (1, 2)
    assert {"host", "pid"} <= set(first)
    assert datetime.fromisoformat(first["time"]).tzinfo == UTC
    assert "exception" not in first
    assert "ValueError: lost" in second["exception"]


def test_the_start_line_says_version_host_rank_device_data_cache_and_plan(logging_to):
    about = {"rank": "0/1", "device": "cpu", "data": "d.json", "cache": "s3://user:geheim99@b/c", "plan": "3 shards"}
    end = logging_to()
    log_start("cache-teacher", **about, images=None)
    (line,) = end()
    for part in (
        f"alignkd {__version__} cache-teacher starts: host ",
        "rank 0/1",
        "device cpu",
        "data d.json",
        "plan 3 shards",
    ):
        assert part in line
    assert "cache s3://b/c" in line
    assert "images" not in line
    end = logging_to(log_json=True)
    log_start("cache-teacher", **about)
    entry = json.loads(end()[0])
    assert (entry["version"], entry["plan"], entry["cache"]) == (__version__, "3 shards", "s3://b/c")
    assert (entry["rank"], entry["world_size"]) == (0, 1)


def test_progress_goes_to_the_log_where_no_bar_is_drawn(logging_to, monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr(progress_module, "stderr_console", terminal)
    end = logging_to(log_json=True)
    with progress_bar("distill", 2, "steps") as progress:
        progress.advance(2)
    entry = json.loads(end()[-1])
    assert (entry["progress"], entry["done"], entry["total"], entry["unit"]) == ("distill", 2, 2, "steps")
    assert terminal.file.getvalue().strip() == ""


def test_lines_stand_above_a_bar_on_a_terminal(logging_to, monkeypatch, tmp_path):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    monkeypatch.setattr(progress_module, "stderr_console", terminal)
    end = logging_to(log_file=str(tmp_path / "run.log"))
    with progress_bar("distill", 2, "steps") as progress:
        progress.advance(2)
        LOG.warning("[red]odd[/]")
    end()
    shown = terminal.file.getvalue()
    assert re.search(r"Z WARNING \[red\]odd\[/\]\n", shown)
    assert "2 steps done" not in shown
    assert "distill: 2 steps done" in (tmp_path / "run.log").read_text()


def test_a_log_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--log-file .* cannot be written"):
        start_logging(LogConfig(log_file=str(tmp_path / "file" / "run.log")), Worker())


def test_a_log_that_can_no_longer_be_written_does_not_end_the_job(logging_to, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    end = logging_to(log_file=str(tmp_path / "run.log"))
    (handler,) = [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler) and "run.log" in h.baseFilename]
    monkeypatch.setattr(handler, "format", full)
    LOG.info("one")
    LOG.info("two")
    assert sum("cannot be written: [Errno 28]" in line for line in end()) == 1


def test_logging_leaves_no_trace(logging_to):
    before = (list(logging.getLogger().handlers), logging.getLogger().level, logging.getLogger("alignkd").level)
    logging_to()()
    assert before == (list(logging.getLogger().handlers), logging.getLogger().level, logging.getLogger("alignkd").level)


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_stage_one_and_two_log_from_start_to_end(door, tmp_path):
    bad = record("bad", "none.png", "<image>\nWhat?", "This.")
    data = write_data(tmp_path / "d.json", [*SAMPLES[:3], bad])
    common = ["--data", data, "--images", IMAGES, "--device", "cpu", "--json"]
    log = tmp_path / "one.log"
    first = ["cache-teacher", "--teacher", TEACHER, "--cache", tmp_path / "cache", "--shard-samples", 2, *common]
    one = door(*first, "--log-file", log)
    assert one.code == 0, one.stderr
    assert all(TIMED.match(line) for line in one.stderr.splitlines() if not line.startswith("    ")), one.stderr
    assert log.read_text() == one.stderr
    assert len(objects(one.stdout)) == 1
    (start,) = [line for line in one.stderr.splitlines() if " starts: host " in line]
    for part in ("rank 0/1", "device cpu", "(4 samples)", "plan 2 shards of up to 2 samples, 0 of them done"):
        assert part in start
    assert "bad" in one.stderr
    second = ["distill", "--student", STUDENT, "--cache", tmp_path / "cache", "--out", tmp_path / "out", "--max-steps", 2]
    two = door(*second, "--batch-size", 2, "--workers", 0, "--log-json", *common)
    assert two.code == 0, two.stderr
    (start,) = [entry for entry in objects(two.stderr) if "version" in entry]
    assert start["command"] == "distill"
    assert {"host", "rank", "device", "data", "cache", "plan"} <= set(start)
    third = door(*second, "--batch-size", 2, "--workers", 0, "--log-json", *common)
    assert third.code == 2
    last = objects(third.stderr)[-1]
    assert last["level"] == "error"
    assert "already holds a run" in last["message"]


def test_an_error_is_in_the_log_file_and_once_on_the_terminal(door, tmp_path):
    log = tmp_path / "run.log"
    words = ["cache-teacher", "--teacher", tmp_path / "none", "--data", tmp_path / "none.json", "--cache", tmp_path / "cache"]
    finished = door(*words, "--log-file", log)
    assert finished.code == 2
    assert sum("none.json" in line for line in finished.stderr.splitlines()) == 1
    assert re.search(r"Z ERROR +data file .*none.json", log.read_text())
