"""Who does what, from flags or from the launcher; and that all of it is done once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkd.errors import ConfigError
from alignkd.pipeline.runtime.ranks import Worker, find_process, find_worker


def array(here, first, last, **more):
    names = {"SLURM_ARRAY_TASK_ID": here, "SLURM_ARRAY_TASK_MIN": first, "SLURM_ARRAY_TASK_MAX": last, **more}
    return {name: str(value) for name, value in names.items()}


def task(here, count, local=0):
    return {"SLURM_PROCID": str(here), "SLURM_STEP_NUM_TASKS": str(count), "SLURM_LOCALID": str(local)}


KUBERNETES = {"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "4"}

LAUNCHERS = {
    "none": ({}, Worker(0, 1, 0)),
    "torchrun": ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Worker(5, 8, 1)),
    "torchrun within a SLURM job": ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **task(0, 1)}, Worker(1, 2, 1)),
    "SLURM step": (task(3, 4, 1), Worker(3, 4, 1)),
    "SLURM batch script of four tasks, of which srun starts none": (
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"},
        Worker(0, 1, 0),
    ),
    "SLURM step of two within a job of eight": ({"SLURM_NTASKS": "8", **task(1, 2)}, Worker(1, 2, 0)),
    "SLURM array": (array(3, 0, 7), Worker(3, 8, 0)),
    "SLURM array from 10 to 29 in steps of 5": (array(20, 10, 25, SLURM_ARRAY_TASK_STEP=5), Worker(2, 4, 0)),
    "SLURM array with its count": (array(4, 1, 4, SLURM_ARRAY_TASK_COUNT=4), Worker(3, 4, 0)),
    "SLURM array of tasks": ({**array(2, 1, 3), **task(1, 4, 1)}, Worker(5, 12, 1)),
    "Kubernetes": (KUBERNETES, Worker(2, 4, 0)),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rank_and_world_size_come_from_the_launcher(name):
    environment, expected = LAUNCHERS[name]
    assert find_worker(environment=environment) == expected


@pytest.mark.parametrize("name", LAUNCHERS)
def test_flags_win_over_every_launcher(name):
    assert find_worker(1, 3, LAUNCHERS[name][0]) == Worker(1, 3, 0)


REFUSED = {
    "rank alone": (0, None, {}, "--rank and --world-size are given together"),
    "world size alone": (None, 2, KUBERNETES, "--rank and --world-size are given together"),
    "rank beyond the world": (2, 2, {}, "rank 2 of 2 workers: expected 0 <= rank < world size"),
    "Kubernetes without a number of workers": (
        None,
        None,
        {"JOB_COMPLETION_INDEX": "2"},
        "set WORLD_SIZE to the job's completions, or give --rank and --world-size",
    ),
    "array without its end": (
        None,
        None,
        {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "0"},
        "SLURM_ARRAY_TASK_ID is set but SLURM_ARRAY_TASK_MAX is not",
    ),
    "array with gaps": (
        None,
        None,
        array(7, 1, 7, SLURM_ARRAY_TASK_COUNT=3),
        "not every 1. number from 1 to 7.*submit the array without gaps, or give --rank and --world-size",
    ),
    "no number": (None, None, {"RANK": "first", "WORLD_SIZE": "2"}, "RANK='first' in the environment: expected a number"),
    "no number of tasks": (
        None,
        None,
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4(x2)"},
        r"SLURM_STEP_NUM_TASKS='4\(x2\)' in",
    ),
    "array without steps": (None, None, array(1, 0, 3, SLURM_ARRAY_TASK_STEP=0), "SLURM_ARRAY_TASK_STEP=0 in the environment"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_leaves_open_who_does_what_is_refused(name):
    rank, world_size, environment, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words):
        find_worker(rank, world_size, environment)


def test_a_training_process_is_known_from_torchrun_and_from_srun():
    assert find_process({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Worker(5, 8, 1)
    assert find_process({"RANK": "abc"}) == Worker(0, 1, 0)
    assert find_process(task(3, 4)) == Worker(3, 4, 0)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_variable_of_torchrun_that_is_not_a_number_is_named(name):
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", name: "abc"}
    with pytest.raises(ConfigError, match=f"{name}='abc' in the environment: expected a number.*unset {name}"):
        find_process(environment)


PENDING = st.sets(st.integers(0, 60)).map(sorted)


@given(PENDING, st.integers(1, 70))
def test_the_workers_together_take_every_shard_once(pending, world_size):
    taken = [shard for rank in range(world_size) for shard in Worker(rank, world_size).order(pending, steal=False)]
    assert sorted(taken) == pending


@given(PENDING, st.integers(1, 9))
def test_who_steals_takes_its_own_shards_first_and_the_others_from_the_end(pending, world_size):
    for worker in (Worker(rank, world_size) for rank in range(world_size)):
        order, own = worker.order(pending, steal=True), worker.order(pending, steal=False)
        assert order[: len(own)] == own == sorted(own)
        stolen = order[len(own) :]
        assert stolen == sorted(stolen, reverse=True)
        assert sorted(order) == pending


@given(array_size=st.integers(1, 5), tasks=st.integers(1, 5), first=st.integers(0, 9), step=st.integers(1, 4))
def test_an_array_of_tasks_counts_every_worker_once(array_size, tasks, first, step):
    last = first + step * (array_size - 1)
    workers = [
        find_worker(environment={**array(first + step * element, first, last, SLURM_ARRAY_TASK_STEP=step), **task(here, tasks)})
        for element in range(array_size)
        for here in range(tasks)
    ]
    assert [worker.rank for worker in workers] == list(range(array_size * tasks))
    assert {worker.world_size for worker in workers} == {array_size * tasks}
