"""The dtype in which losses are computed."""

import torch


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """The values in float32; float64 stays as it is."""
    return values if values.dtype == torch.float64 else values.float()
