"""The processes of a training run, and small sums over them on the host, while the devices work."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from alignkd.errors import AlignkdError, TransientError
from alignkd.pipeline.runtime.out_of_memory import is_out_of_memory
from alignkd.pipeline.runtime.ranks import Worker

T = TypeVar("T")
_LOST_TEXTS = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "gloo", "nccl")


class Processes:
    """Small sums over all processes, through a gloo group of their own: no device waits, and none is waited for.

    Raises (every method):
        TransientError: another process has ended, or did not come within ``longest_wait_s`` seconds.
    """

    def __init__(self, process: Worker, longest_wait_s: float = 1800.0) -> None:
        """A collective: every process calls it, after the default group was made. A single process needs no group."""
        self.rank, self.world_size, self.local_rank = process.rank, process.world_size, process.local_rank
        limit = timedelta(seconds=longest_wait_s)
        self._group = dist.new_group(backend="gloo", timeout=limit) if self.world_size > 1 else None

    @property
    def first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over processes."""
        return self.reduce(torch.tensor(values, dtype=torch.float64)).tolist() if self._group else list(values)

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over processes, on the host."""
        found = values.detach().cpu()
        if self._group is not None:
            found = found.clone()
            with lost_processes(self.world_size):
                dist.all_reduce(found, group=self._group)
        return found

    def from_first(self, value: Any) -> Any:
        """What the first process has; ``value`` counts there alone, and can be pickled."""
        if self._group is None:
            return value
        holder = [value if self.first else None]
        with lost_processes(self.world_size):
            dist.broadcast_object_list(holder, src=0, group=self._group)
        return holder[0]

    def by_first(self, call: Callable[[], T]) -> T:
        """What a call gives to the first process, which alone makes it. Its error is raised in all of them."""
        outcome: tuple[Any, Exception | None] = None, None
        if self.first:
            try:
                outcome = call(), None
            except (AlignkdError, OSError) as error:
                outcome = None, error
        found, failed = self.from_first(outcome)
        if failed is not None:
            raise failed
        result: T = found
        return result

    def gather(self, values: Sequence[T]) -> list[T]:
        """The values of all processes, in the order of their ranks; they must be small, and can be pickled."""
        if self._group is None:
            return list(values)
        found: list[Any] = [None] * self.world_size
        with lost_processes(self.world_size):
            dist.all_gather_object(found, list(values), group=self._group)
        return [value for part in found for value in part]

    def wait(self) -> None:
        """Wait until every process has called this."""
        self.sum([0.0])


@contextmanager
def lost_processes(world_size: int) -> Iterator[None]:
    """Turn what torch raises when another process has gone, or does not answer, into one message."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        lost = isinstance(error, dist.DistError) or any(known in text.lower() for known in _LOST_TEXTS)
        if world_size == 1 or not lost or is_out_of_memory(error):
            raise
        raise TransientError(
            f"another process of this run has ended, or does not answer ({text[:200]}): see what the others printed, then"
            " run the same command again with --resume"
        ) from error
