"""Devices, dtypes and peak memory."""

import resource
import sys

import torch

from alignkd.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def peak_memory_bytes() -> int:
    """Peak memory: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def pick_device(name: str | None, local_rank: int = 0) -> str:
    """The device asked for. Without one: the GPU if there is one (of several, the one of the local rank), else the CPU.

    Raises:
        ConfigError: this machine does not have it, or torch does not know it.
    """
    if name is None:
        if not torch.cuda.is_available():
            return "cpu"
        count = torch.cuda.device_count()
        return "cuda" if count == 1 else f"cuda:{local_rank % count}"
    try:
        torch.empty(1, device=name).tolist()  # the device "meta" makes tensors, but holds no values
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"--device {name} cannot be used here: {cause}") from error
    return name


def device_words(device: str) -> str:
    """A device for people: ``cuda:0 (NVIDIA H200)``."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device


def parse_dtype(name: str) -> torch.dtype:
    """A dtype by its name on the command line.

    Raises:
        ConfigError: it is not one of those that models run in.
    """
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is not known; expected {', '.join(_DTYPES)}")
    return _DTYPES[name]
