"""Copies from a device to the host that nothing waits for until they are needed."""

from collections.abc import Mapping

import torch


def copy_to_host(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.cuda.Event | None]:
    """The tensors on the host, and the event to wait for before they are read; None where there is nothing to wait for.

    Tensors that are on the host already are returned themselves, not copied.
    """
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return dict(tensors), None
    host = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for name, tensor in tensors.items()
    }
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return host, arrived
