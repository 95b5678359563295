"""The processes of a training run (torchrun's), and what they agree on over the host, while the devices work."""

import os
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from alignkd.pipeline.runtime.ranks import Worker


def find_process(environment: Mapping[str, str] = os.environ) -> Worker:
    """Which process of a torchrun (or ``accelerate launch``, or DeepSpeed) job this is; the only one without."""
    if not {"RANK", "WORLD_SIZE"} <= environment.keys():
        return Worker()
    return Worker(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", 0)))


class Processes:
    """Small sums over all processes, through a gloo group of their own: no device is waited for, and none waits."""

    def __init__(self, process: Worker) -> None:
        """Collective, after the default group was made; a single process needs none."""
        self.rank, self.world_size = process.rank, process.world_size
        self._group = dist.new_group(backend="gloo") if self.world_size > 1 else None

    @property
    def first(self) -> bool:
        """Whether this one writes the run's files."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of each value over processes."""
        return self.reduce(torch.tensor(values, dtype=torch.float64)).tolist() if self._group else list(values)

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The sums of a tensor over processes, on the host."""
        found = values.detach().cpu()
        if self._group is not None:
            found = found.clone()
            dist.all_reduce(found, group=self._group)
        return found

    def wait(self) -> None:
        """Until every process is here."""
        self.sum([0.0])
