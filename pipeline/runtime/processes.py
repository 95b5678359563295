"""The processes of a training run, and small sums over them on the host, while the devices work."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from alignkd.pipeline.runtime.ranks import Worker


class Processes:
    """Small sums over all processes, through a gloo group of their own: no device waits, and none is waited for."""

    def __init__(self, process: Worker) -> None:
        """A collective: every process calls it, after the default group was made. A single process needs no group."""
        self.rank, self.world_size = process.rank, process.world_size
        self._group = dist.new_group(backend="gloo") if self.world_size > 1 else None

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
            dist.all_reduce(found, group=self._group)
        return found

    def wait(self) -> None:
        """Wait until every process has called this."""
        self.sum([0.0])
