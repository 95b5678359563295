"""Where the processes of one training job meet, and the group that they form there."""

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from alignkd.errors import ConfigError, TransientError
from alignkd.pipeline.runtime.processes import Processes
from alignkd.pipeline.runtime.ranks import Worker

DEFAULT_PORT = 29500
"""Torch's own."""

_SLURM_PORTS = 12000, 20000
"""First port, and how many: below those that systems give to outgoing connections."""


@contextmanager
def joined_processes(process: Worker, *, device: str, longest_wait_s: float, deepspeed: bool = False) -> Iterator[Processes]:
    """Form the group of a job's processes, and leave it at the end. DeepSpeed wants a group even of a single process.

    Raises:
        ConfigError: the launcher does not tell where to meet.
        TransientError: the others did not come.
    """
    if process.world_size == 1 and not (deepspeed and "RANK" not in os.environ):
        yield Processes(process, longest_wait_s)
        return
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    host, port = meeting_point(process)
    os.environ.update(RANK=str(process.rank), WORLD_SIZE=str(process.world_size), LOCAL_RANK=str(process.local_rank))
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    try:
        if process.world_size > 1:
            _join(process, device, longest_wait_s, f"{host}:{port}")
        yield Processes(process, longest_wait_s)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _join(process: Worker, device: str, longest_wait_s: float, place: str) -> None:
    backend = "nccl" if device.startswith("cuda") else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=longest_wait_s))
    except (RuntimeError, ValueError) as error:
        cause = " ".join(str(error).split())[:300].rstrip(".")
        if "EADDRINUSE" in cause:
            raise ConfigError(
                f"{place}, where the processes of this run are to meet, is in use by another program: set MASTER_PORT to a free"
                " port, the same for all of them"
            ) from error
        raise TransientError(
            f"process {process} of this run did not meet the others at {place}: {cause}. All have to be started, and to reach"
            " that address; MASTER_ADDR and MASTER_PORT set another one"
        ) from error


def meeting_point(process: Worker, environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port where the first process waits for the others: the launcher's, else from what SLURM or MPI set.

    Raises:
        ConfigError: they do not tell, or MASTER_PORT is no port.
    """
    host = environment.get("MASTER_ADDR") or _first_host(process, environment)
    text = environment.get("MASTER_PORT")
    if text is None:
        return host, _free_port() if process.world_size == 1 else _shared_port(environment)
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise ConfigError(f"MASTER_PORT={text!r} in the environment: expected a port, 1 to 65535")
    return host, int(text)


def _first_host(process: Worker, environment: Mapping[str, str]) -> str:
    if process.world_size == 1:
        return "127.0.0.1"
    if "SLURM_STEP_NUM_TASKS" in environment and "RANK" not in environment:
        hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST")
        nodes = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES", "1")
        if nodes == "1":
            return "127.0.0.1"
        if hosts:
            return first_host(hosts)
    for size, here in (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"), ("PMI_SIZE", "MPI_LOCALNRANKS")):
        if size in environment and environment[size] == environment.get(here):
            return "127.0.0.1"
    raise ConfigError(
        f"this is process {process} of a run on several machines, but not where they meet: export MASTER_ADDR (the machine of"
        " the first process) and MASTER_PORT for all of them, or start one torchrun on each machine"
    )


def first_host(hosts: str) -> str:
    """The first of SLURM's hosts: ``gpu[03-07,9],big1`` gives ``gpu03``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[([^\]\-,]+)[^\]]*\]", r"\1", first.group() if first else hosts)


def _shared_port(environment: Mapping[str, str]) -> int:
    """The same for all processes of a step, and mostly another one for two jobs on the same machine."""
    job, step = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", "0")
    if not (job.isdecimal() and step.isdecimal()):
        return DEFAULT_PORT
    first, count = _SLURM_PORTS
    return first + (int(job) * 37 + int(step)) % count


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
