"""One training job whatever launched it: torchrun, srun, Open MPI, MPICH, or nothing."""

from __future__ import annotations

import os
import socket

import pytest
from tiny_runs import IMAGES, STUDENT, metrics

from alignkd.errors import ConfigError, TransientError
from alignkd.pipeline.runtime.ranks import Worker, find_process, find_worker
from alignkd.pipeline.runtime.rendezvous import DEFAULT_PORT, first_host, joined_processes, meeting_point

SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}


@pytest.mark.parametrize("environment", [SRUN, OPEN_MPI, PMI], ids=["srun", "Open MPI", "PMI"])
def test_the_ranks_of_a_training_job_come_from_its_launcher(environment):
    assert find_process(environment) == Worker(1, 2, 1)


@pytest.mark.parametrize("environment", [OPEN_MPI, PMI], ids=["Open MPI", "PMI"])
def test_the_workers_of_stage_one_come_from_mpi_as_well(environment):
    assert find_worker(environment=environment) == Worker(1, 2, 1)


def test_torchrun_within_srun_decides():
    launched = {**SRUN, "SLURM_PROCID": "0", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert find_process(launched) == Worker(3, 4, 1)


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
        {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "9", "SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"PMIX_RANK": "0"},
    ],
    ids=["a batch script", "an element of an array", "a step of one task", "a rank alone"],
)
def test_a_single_process_is_a_job_of_its_own(environment):
    assert find_process(environment) == Worker()


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu[03-07,9],big1", "gpu03"),
        ("n1,n2", "n1"),
        ("alone", "alone"),
        ("r[1-2]n[05,07]-ib", "r1n05-ib"),
        ("a-b-1", "a-b-1"),
    ],
)
def test_the_first_host_of_slurms_list(hosts, first):
    assert first_host(hosts) == first


@pytest.mark.parametrize(
    ("environment", "host"),
    [
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_STEP_NUM_NODES": "2"}, "gpu03"),
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu03", "SLURM_STEP_NUM_NODES": "1"}, "127.0.0.1"),
        (SRUN, "127.0.0.1"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "127.0.0.1"),
        ({**OPEN_MPI, "MASTER_ADDR": "big1"}, "big1"),
        ({**PMI, "MPI_LOCALNRANKS": "2"}, "127.0.0.1"),
    ],
)
def test_the_first_process_is_found(environment, host):
    assert meeting_point(Worker(1, 2), environment)[0] == host


@pytest.mark.parametrize(
    "environment", [{**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, PMI, {"RANK": "1", "WORLD_SIZE": "2"}]
)
def test_where_the_machines_cannot_be_told_what_to_set_is_said(environment):
    with pytest.raises(ConfigError, match=r"export MASTER_ADDR .* and MASTER_PORT .* or start one torchrun"):
        meeting_point(Worker(1, 2), environment)


def test_ports_are_the_same_in_a_step_and_mostly_others_in_other_jobs():
    ports = {job: meeting_point(Worker(0, 2), {**SRUN, "SLURM_JOB_ID": str(job)})[1] for job in range(1, 500)}
    assert len(set(ports.values())) == len(ports)
    assert all(1024 < port < 32768 for port in ports.values())
    assert ports[7] == meeting_point(Worker(1, 2), SRUN)[1]
    assert meeting_point(Worker(1, 2), {**OPEN_MPI, "MASTER_ADDR": "x"})[1] == DEFAULT_PORT


@pytest.mark.parametrize("port", ["no", "0", "70000", ""])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(ConfigError, match=r"MASTER_PORT=.* expected a port"):
        meeting_point(Worker(0, 2), {**SRUN, "MASTER_PORT": port})


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def at_free_port(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", free_port())


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.usefixtures("at_free_port")
def test_others_that_do_not_come_are_not_awaited_for_ever():
    joined = joined_processes(Worker(1, 2), device="cpu", longest_wait_s=1.0)
    with pytest.raises(TransientError, match=r"process 1/2 of this run did not meet the others at 127\.0\.0\.1"), joined:
        raise AssertionError("not reached")
    assert "RANK" not in os.environ


def test_a_port_in_use_is_said(monkeypatch):
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(busy.getsockname()[1]))
        joined = joined_processes(Worker(0, 2), device="cpu", longest_wait_s=5.0)
        with pytest.raises(ConfigError, match=r"in use by another program: set MASTER_PORT"), joined:
            raise AssertionError("not reached")


def run_under(door, monkeypatch, launcher, rank_names, arguments):
    running = []
    for rank in ("0", "1"):
        with monkeypatch.context() as patch:
            for name, value in {**launcher, **dict.fromkeys(rank_names, rank)}.items():
                patch.setenv(name, value)
            running.append(door.start(*arguments))
    return [one.finish() for one in running]


def arguments_of(data, cache, out):
    arguments = ["distill", "--student", STUDENT, "--cache", cache, "--data", data, "--images", IMAGES, "--out", out]
    return [*arguments, "--device", "cpu", "--batch-size", 1, "--max-steps", 3, "--log-steps", 1, "--workers", 0]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    ("launcher", "rank_names"),
    [
        (SRUN, ("SLURM_PROCID", "SLURM_LOCALID")),
        pytest.param(
            {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["srun", "Open MPI"],
)
@pytest.mark.usefixtures("at_free_port")
def test_the_tasks_of_a_launcher_are_one_run(door, monkeypatch, data, cache, tmp_path, launcher, rank_names):
    first, second = run_under(door, monkeypatch, launcher, rank_names, arguments_of(data, cache, tmp_path / "out"))
    assert (first.code, second.code) == (0, 0), first.stderr
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2, 3]
    assert metrics(tmp_path / "out")[-1]["samples"] > 3


@pytest.mark.processes
@pytest.mark.slow
def test_deepspeed_runs_as_one_process_without_a_launcher(door, data, cache, tmp_path):
    done = door(*arguments_of(data, cache, tmp_path / "out"), "--deepspeed", "zero2")
    assert done.code == 0, done.stderr
    assert "mpi4py" not in done.stderr
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2, 3]
