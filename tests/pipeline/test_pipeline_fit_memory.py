"""Batches too large for the memory are halved; nothing else is swallowed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import SAMPLES, content, record, stage_one_config, write_cache, write_data

from alignkd.cache_store.protocol.store import open_store
from alignkd.errors import TransientError
from alignkd.inputs.encoder import Planned
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.stage_one import calibrate as calibrate_module
from alignkd.pipeline.stage_one.dry_run import dry_run
from alignkd.pipeline.stage_one.halve_on_oom import HalvingRunner
from alignkd.pipeline.stage_one.shard_work import PlannedSample, ReadyBatch
from alignkd.pipeline.stage_one.teacher_stage import StageOne

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
]


class SmallMemory:
    """A stage for whose device more than ``limit`` positions are too many."""

    def __init__(self, limit, error=OUT_OF_MEMORY[0]):
        self.limit, self.error = limit, error
        self.tried = []

    def collate(self, items):
        return [item.sample.id for item, _ in items]

    def run(self, ready):
        self.tried.append(ready.positions)
        if ready.positions > self.limit:
            raise self.error
        return ready.batch


def batch_of(stage, *lengths):
    items = [
        (PlannedSample(SimpleNamespace(id=f"s{i}", key=f"{i:032x}"), Planned(length)), None) for i, length in enumerate(lengths)
    ]
    return ReadyBatch(items, stage.collate(items), [])


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_batch_that_does_not_fit_is_halved_until_it_does(error):
    stage = SmallMemory(25, error)
    done, rejected = HalvingRunner(stage).run(batch_of(stage, 10, 10, 10, 10, 10))
    assert [output for _, output in done] == [["s0", "s1"], ["s2"], ["s3", "s4"]]
    assert [part.batch for part, _ in done] == [output for _, output in done]
    assert rejected == []


def test_the_size_that_fits_is_remembered():
    stage = SmallMemory(25)
    runner = HalvingRunner(stage)
    runner.run(batch_of(stage, 10, 10, 10, 10))
    stage.tried.clear()
    done, _ = runner.run(batch_of(stage, 10, 10, 10, 10))
    assert stage.tried == [20, 20]
    assert [output for _, output in done] == [["s0", "s1"], ["s2", "s3"]]


def test_what_fits_is_run_as_it_is():
    stage = SmallMemory(100)
    done, rejected = HalvingRunner(stage).run(batch_of(stage, 30, 20, 10))
    assert (stage.tried, [output for _, output in done], rejected) == ([90], [["s0", "s1", "s2"]], [])


def test_a_sample_that_does_not_fit_alone_is_rejected_by_name_and_the_others_are_done():
    stage = SmallMemory(25)
    done, rejected = HalvingRunner(stage).run(batch_of(stage, 40, 10, 10))
    assert [output for _, output in done] == [["s1", "s2"]]
    assert [(sample.sample_id, sample.key) for sample in rejected] == [("s0", f"{0:032x}")]
    assert rejected[0].reason == "its 40 positions do not fit into memory, even alone"


def test_a_large_sample_does_not_make_small_batches_of_all_that_follow():
    stage = SmallMemory(25)
    runner = HalvingRunner(stage)
    runner.run(batch_of(stage, 100))
    stage.tried.clear()
    runner.run(batch_of(stage, 10, 10))
    assert stage.tried == [20]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert"), ValueError("no"), KeyboardInterrupt()])
def test_any_other_error_is_raised(error):
    stage = SmallMemory(0, error)
    with pytest.raises(type(error)):
        HalvingRunner(stage).run(batch_of(stage, 10, 10))
    assert len(stage.tried) == 1


def test_a_batch_of_which_nothing_is_left_is_not_run():
    assert HalvingRunner(SmallMemory(100)).run(ReadyBatch([], None, [])) == ([], [])


def test_a_sample_alone_is_tried_again_after_pauses():
    stage, pauses = SmallMemory(5), []

    def pause(seconds):
        pauses.append(seconds)
        stage.limit = 10 * len(pauses) - 5

    done, rejected = HalvingRunner(stage, pause=pause).run(batch_of(stage, 10))
    assert ([output for _, output in done], rejected) == ([["s0"]], [])
    assert pauses == sorted(pauses)
    assert len(pauses) == 2


def test_memory_that_is_gone_is_not_the_fault_of_a_sample_shorter_than_one_that_fitted():
    stage = SmallMemory(25)
    runner = HalvingRunner(stage, pause=lambda _: None)
    runner.run(batch_of(stage, 20))
    stage.limit = 5
    with pytest.raises(TransientError, match="10 positions, though 20 positions fitted before: another process"):
        runner.run(batch_of(stage, 10))


LONG = record("long", None, "What " + "is it " * 150 + "?", "This.")


@pytest.fixture
def little_memory(monkeypatch):
    """More than 400 positions do not fit; what was tried."""
    real, tried = StageOne.run, []

    def run(self, ready):
        tried.append(ready.positions)
        if ready.positions > 400:
            raise OUT_OF_MEMORY[0]
        return real(self, ready)

    with monkeypatch.context() as patch:
        patch.setattr(StageOne, "run", run)
        yield tried


@pytest.mark.slow
def test_stage_one_writes_everything_with_little_memory_and_rejects_what_never_fits(tmp_path, little_memory):
    data = write_data(tmp_path / "small.json", [*SAMPLES[:2], LONG, SAMPLES[4]])
    # Without logits: their calibration would see the long sample, too.
    settings = TargetSettings(targets=("attention", "vision"))
    done = write_cache(data, tmp_path / "small", shard_samples=4, settings=settings)
    assert little_memory[0] > 1000
    assert (done["complete"], done["samples_done"]) == (True, 3)
    assert [sample["id"] for sample in done["rejected"]] == ["long"]
    assert "positions do not fit into memory, even alone" in done["rejected"][0]["reason"]
    one_by_one = write_data(tmp_path / "large.json", [*SAMPLES[:2], SAMPLES[4]])
    write_cache(one_by_one, tmp_path / "large", batch_tokens=1, settings=settings)
    assert content(tmp_path / "small") == content(tmp_path / "large")


@pytest.mark.slow
def test_a_dry_run_with_little_memory_estimates_as_well(tmp_path, little_memory):
    data = write_data(tmp_path / "d.json", [*SAMPLES[:2], LONG, SAMPLES[4]])
    figures = dry_run(stage_one_config(data, tmp_path / "cache"))
    assert (figures["tried"], figures["rejected_of_tried"]) == (4, 1)
    assert figures["bytes_per_sample"] > 0
    with pytest.raises(ValueError, match=r"none of 1 samples tried can be used. First: long: its \d+ positions do not fit"):
        dry_run(stage_one_config(write_data(tmp_path / "long.json", [LONG]), tmp_path / "cache"))


def test_a_calibration_leaves_out_what_memory_has_no_room_for(tmp_path, monkeypatch):
    real = calibrate_module.capture

    def capture(model, batch, **options):
        if batch.input_ids_BS.numel() > 400:
            raise OUT_OF_MEMORY[0]
        return real(model, batch, **options)

    monkeypatch.setattr(calibrate_module, "capture", capture)
    small = write_data(tmp_path / "small.json", [SAMPLES[0], SAMPLES[4]])
    large = write_data(tmp_path / "large.json", [SAMPLES[0], SAMPLES[4], LONG])
    tensors = [StageOne.open(stage_one_config(data, tmp_path / "cache")).tensors() for data in (small, large)]
    assert tensors[0].keys() == tensors[1].keys()
    np.testing.assert_array_equal(tensors[0]["logits.id_of_rank"], tensors[1]["logits.id_of_rank"])


def test_where_nothing_fits_at_all_no_sample_is_rejected(tmp_path, little_memory):
    data = write_data(tmp_path / "d.json", [LONG, SAMPLES[4]])
    settings = TargetSettings(targets=("attention", "vision"))
    with pytest.raises(TransientError, match="memory ran out for each of the first 1 samples"):
        write_cache(data, tmp_path / "cache", shard_samples=1, settings=settings)
    assert little_memory
    assert (open_store(tmp_path / "cache").status().rejected, len(open_store(tmp_path / "cache").pending())) == ((), 2)
