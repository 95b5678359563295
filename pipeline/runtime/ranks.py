"""Which part of the work each of many workers does: rank and number of workers, from flags or from the launcher's environment.

Shard n belongs to rank n modulo the number of workers. This is a pure function, so workers need not start together, and
a later run with another number of workers takes the shards that have no record yet.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alignkd.errors import ConfigError


@dataclass(frozen=True)
class Worker:
    """One of ``world_size`` workers, counted from 0; ``local_rank`` counts those on one machine, and picks the GPU."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} of {self.world_size} workers: expected 0 <= rank < world size")

    def owns(self, shard: int) -> bool:
        """Whether a shard is this worker's."""
        return shard % self.world_size == self.rank

    def order(self, pending: Sequence[int], *, steal: bool) -> list[int]:
        """Its own pending shards. With ``steal``, then those of others, last ones first: their owners reach them last."""
        own = [shard for shard in pending if self.owns(shard)]
        return own + [shard for shard in reversed(pending) if not self.owns(shard)] if steal else own

    def __str__(self) -> str:
        return f"{self.rank}/{self.world_size}"


def find_worker(rank: int | None = None, world_size: int | None = None, environment: Mapping[str, str] = os.environ) -> Worker:
    """Flags first; then torchrun, SLURM (tasks, arrays, arrays of tasks), Kubernetes indexed jobs, MPI; else the only worker.

    Raises:
        ConfigError: some of what is needed is missing, or is not a number.
    """
    if rank is not None or world_size is not None:
        if rank is None or world_size is None:
            raise ConfigError("--rank and --world-size are given together, or neither")
        return Worker(rank, world_size)
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return find_process(environment)
    if "SLURM_PROCID" in environment or "SLURM_ARRAY_TASK_ID" in environment:
        return _slurm(environment)
    if "JOB_COMPLETION_INDEX" in environment:
        if "WORLD_SIZE" not in environment:
            raise ConfigError(
                "JOB_COMPLETION_INDEX is set, so this is a Kubernetes indexed job, but the number of workers is missing: set"
                " WORLD_SIZE to the job's completions, or give --rank and --world-size"
            )
        rank, world_size = _numbers(environment, "JOB_COMPLETION_INDEX", "WORLD_SIZE")
        return Worker(rank, world_size)
    return _mpi(environment) or Worker()


def find_process(environment: Mapping[str, str] = os.environ) -> Worker:
    """Which process of one training job this is; without a launcher, the only one.

    Launchers: torchrun, ``accelerate launch`` or DeepSpeed; else the tasks of one ``srun``; else Open MPI or PMI. Elements of
    a SLURM array are jobs of their own.

    Raises:
        ConfigError: a variable of the launcher is not a number, or the rank is not below the world size.
    """
    if {"RANK", "WORLD_SIZE"} <= environment.keys():
        rank, world_size = _numbers(environment, "RANK", "WORLD_SIZE")
        return Worker(rank, world_size, _number(environment, "LOCAL_RANK", 0))
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if tasks > 1:
        (task,) = _numbers(environment, "SLURM_PROCID")
        return Worker(task, tasks, _number(environment, "SLURM_LOCALID", 0))
    return _mpi(environment) or Worker()


_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
"""Rank, number of processes, and rank on one machine, as Open MPI sets them, and MPICH and Intel MPI."""


def _mpi(environment: Mapping[str, str]) -> Worker | None:
    for rank, size, local_rank in _MPI:
        if {rank, size} <= environment.keys():
            number, count = _numbers(environment, rank, size)
            return Worker(number, count, _number(environment, local_rank, 0))
    return None


def _slurm(environment: Mapping[str, str]) -> Worker:
    """Tasks of a step within elements of an array; either may be absent."""
    # SLURM_NTASKS is also set in a batch script, where a single process runs, whatever number of tasks was asked for.
    task, tasks = _number(environment, "SLURM_PROCID", 0), _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    element, elements = 0, 1
    if "SLURM_ARRAY_TASK_ID" in environment:
        here, first, last = _numbers(environment, "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX")
        step = _number(environment, "SLURM_ARRAY_TASK_STEP", 1)
        if step < 1:
            raise ConfigError(f"SLURM_ARRAY_TASK_STEP={step} in the environment: expected 1 or more")
        element, elements = (here - first) // step, (last - first) // step + 1
        if _number(environment, "SLURM_ARRAY_TASK_COUNT", elements) != elements:
            raise ConfigError(
                f"the elements of this SLURM array are not every {step}. number from {first} to {last}, so the rank of each is"
                " not known: submit the array without gaps, or give --rank and --world-size"
            )
    return Worker(element * tasks + task, elements * tasks, _number(environment, "SLURM_LOCALID", 0))


def _numbers(environment: Mapping[str, str], *names: str) -> tuple[int, ...]:
    missing = [name for name in names if name not in environment]
    if missing:
        raise ConfigError(
            f"{names[0]} is set but {', '.join(missing)} is not: start the command through the launcher, or, for cache-teacher,"
            " give --rank and --world-size"
        )
    return tuple(_number(environment, name, 0) for name in names)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(
            f"{name}={text!r} in the environment: expected a number, as the launcher sets it; unset {name}, or start the"
            " command through the launcher"
        ) from error
