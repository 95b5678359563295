"""What TensorBoard shows of a run: groups, one value a step, from the first process alone."""

from __future__ import annotations

import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignkd.pipeline.training.monitoring.tensorboard import TensorBoard

LINE = {"step": 1, "loss": 1.5, "weighted/attention": 0.25, "share/attention": 0.5, "samples": 4, "note": "no number"}


def state(step=0, first=True):
    return types.SimpleNamespace(global_step=step, is_world_process_zero=first)


def run(folder, steps, *, start=0, first=True):
    board = TensorBoard(folder)
    board.on_train_begin(None, state(start, first), None)
    for step in steps:
        board.on_log(None, state(step, first), None, logs={**LINE, "step": step, "loss": float(step)})
    return board


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "tensorboard"


def scalars(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_names_with_a_group_keep_it_and_the_rest_is_one_group(folder):
    board = run(folder, [1, 2])
    board.on_log(None, state(2), None, logs={"train_runtime": 3.0})
    board.on_train_end(None, state(2), None)
    found = scalars(folder)
    assert set(found) == {"train/loss", "train/samples", "weighted/attention", "share/attention"}
    assert found["train/loss"] == [(1, 1.0), (2, 2.0)]
    assert found["weighted/attention"] == [(1, 0.25), (2, 0.25)]


def test_a_line_is_on_disk_before_the_run_ends(folder):
    board = run(folder, [1])
    assert scalars(folder)["train/loss"] == [(1, 1.0)]
    board.on_train_end(None, state(1), None)


def test_steps_that_are_run_again_after_a_resume_show_once(folder):
    run(folder, [1, 2, 3, 4]).on_train_end(None, state(4), None)
    run(folder, [3, 4, 5], start=2).on_train_end(None, state(5), None)
    assert [step for step, _ in scalars(folder)["train/loss"]] == [1, 2, 3, 4, 5]


def test_other_processes_write_nothing(folder):
    run(folder, [1, 2], first=False).on_train_end(None, state(2, first=False), None)
    assert not folder.exists()
