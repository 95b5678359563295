"""Devices, dtypes and peak memory."""

import resource
import sys

import torch


def peak_memory_bytes() -> int:
    """Peak memory: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def pick_device(name: str | None, local_rank: int = 0) -> str:
    """The device asked for; else the GPU where there is one, and where there are several the local rank's own.

    Raises:
        ValueError: it is not here.
    """
    if name is None:
        if not torch.cuda.is_available():
            return "cpu"
        count = torch.cuda.device_count()
        return "cuda" if count == 1 else f"cuda:{local_rank % count}"
    try:
        torch.empty(0, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def parse_dtype(name: str) -> torch.dtype:
    """A dtype by its command-line name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
