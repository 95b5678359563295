"""What stage one says of its work: truncated samples in its figures, and what an operator finds in the log."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from tiny_runs import IMAGES, SAMPLES, TEACHER, TEXT_ONLY, record, stage_one_config, write_cache, write_data

from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.runtime.progress import ProgressBar
from alignkd.pipeline.stage_one.dry_run import dry_run
from alignkd.pipeline.stage_one.teacher_stage import StageOne

LONG = [record(f"long{i}", f"{i}.png", "<image>\nWhat?", "it is " * 300) for i in range(2)]
SHORT = 350
WITHOUT_IMAGE = record("missing", "none.png", "<image>\nWhat?", "This.")
LOG = "alignkd.pipeline.stage_one"


@pytest.fixture
def long_data(tmp_path):
    return write_data(tmp_path / "long.json", [LONG[0], TEXT_ONLY, LONG[1], WITHOUT_IMAGE])


def test_truncated_samples_are_counted_noted_and_warned_of(long_data, tmp_path, monkeypatch, caplog):
    notes = []
    monkeypatch.setattr(ProgressBar, "note", lambda self, text: notes.append(text))
    caplog.set_level(logging.INFO, LOG)
    done = write_cache(long_data, tmp_path / "cache", max_length=SHORT)
    assert (done["new_samples"], done["truncated_samples"], done["samples_rejected"]) == (3, 2, 1)
    assert "1 rejected, 2 truncated" in notes[-1]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "2 samples were truncated to --max-length 350 token ids" in warning
    again = write_cache(long_data, tmp_path / "cache", max_length=SHORT)
    assert (again["new_samples"], again["truncated_samples"]) == (0, 0)  # of this run


def test_nothing_is_said_of_truncation_where_there_is_none(long_data, tmp_path, caplog):
    done = write_cache(long_data, tmp_path / "cache")
    assert done["truncated_samples"] == 0
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("alignkd")]


@pytest.mark.slow
def test_a_dry_run_counts_the_truncated_samples_that_it_tried(long_data, tmp_path):
    found = [dry_run(stage_one_config(long_data, tmp_path / "cache", max_length=length)) for length in (SHORT, 2048)]
    assert [figures["truncated_of_tried"] for figures in found] == [2, 0]


def test_the_log_tells_shards_rejected_samples_and_the_worker(long_data, tmp_path, caplog):
    caplog.set_level(logging.INFO, LOG)
    write_cache(long_data, tmp_path / "cache")
    lines = [r.getMessage() for r in caplog.records if r.name.startswith(LOG)]
    assert lines[0] == "worker 0/1 starts: 2 shards, 4 samples"
    assert [line for line in lines if line.startswith("sample missing is rejected: image ")]
    assert {line.split(" is ")[0] for line in lines if line.startswith("shard ")} == {"shard 0", "shard 1"}
    assert lines[-1] == "worker 0/1 ends: 3 samples, 1 rejected"


def test_a_batch_halved_for_lack_of_memory_is_a_warning(tmp_path, caplog, monkeypatch):
    real = StageOne.run

    def run(self, ready):
        if len(ready.samples) > 1:
            raise MemoryError
        return real(self, ready)

    monkeypatch.setattr(StageOne, "run", run)
    data = write_data(tmp_path / "d.json", [SAMPLES[0], SAMPLES[1]])
    write_cache(data, tmp_path / "cache", settings=TargetSettings(targets=("vision",)))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith(LOG)]
    assert warning.startswith("out of memory with 2 samples, ")
    assert "the batch is halved" in warning


@pytest.mark.slow
def test_the_log_is_quiet_unless_a_caller_asks_for_it(long_data, tmp_path):
    script = """
import sys
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.stage_one.worker import cache_teacher
names = ("teacher", "data", "images", "cache")
figures = cache_teacher(CacheTeacherConfig(**dict(zip(names, sys.argv[1:])), max_length=350, device="cpu"))
print(figures["truncated_samples"])
"""
    command = [sys.executable, "-c", script, *map(str, [TEACHER, long_data, IMAGES, tmp_path / "cache"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"
    assert "samples were truncated" not in done.stderr
    assert "is committed" not in done.stderr
