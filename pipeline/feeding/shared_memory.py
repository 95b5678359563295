"""Send a batch from a loader process with all of its tensors in one piece of shared memory.

Otherwise torch sends each of some thirty tensors in shared memory of its own, and the training process has to ask the
busy loader process for every one of them.
"""

import io
import pickle
from typing import Any

import torch

_ALIGN = 64
"""Bytes: the alignment of every dtype, and of a cache line."""

_Layout = tuple[int, torch.dtype, tuple[int, ...]]
"""Offset in bytes, dtype and shape of a tensor in the buffer."""


class SharedMemoryBatch(dict[str, Any]):
    """A dict of anything. After pickling it is a plain dict whose tensors, at any depth, are views of one buffer."""

    def __reduce__(self) -> tuple[Any, ...]:
        stream = io.BytesIO()
        pickler = _Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL)
        pickler.dump(dict(self))
        return _load, (stream.getvalue(), pickler.buffer())


class _Pickler(pickle.Pickler):
    """Writes the layout of each tensor in its place."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._tensors: list[tuple[_Layout, torch.Tensor]] = []
        self._bytes = 0

    def persistent_id(self, value: Any) -> _Layout | None:
        """The layout of a tensor; None for anything else, which is pickled as usual."""
        if not isinstance(value, torch.Tensor):
            return None
        layout = self._bytes, value.dtype, tuple(value.shape)
        self._tensors.append((layout, value))
        self._bytes += -(-value.nbytes // _ALIGN) * _ALIGN
        return layout

    def buffer(self) -> torch.Tensor:
        """All tensors, one after the other."""
        buffer = torch.empty(self._bytes, dtype=torch.uint8)
        for layout, tensor in self._tensors:
            _view(buffer, layout).copy_(tensor)
        return buffer


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, buffer: torch.Tensor) -> None:
        super().__init__(io.BytesIO(pickled))
        self._buffer = buffer

    def persistent_load(self, layout: _Layout) -> torch.Tensor:
        """The tensor of a layout."""
        return _view(self._buffer, layout)


def _view(buffer: torch.Tensor, layout: _Layout) -> torch.Tensor:
    start, dtype, shape = layout
    return buffer[start : start + dtype.itemsize * torch.Size(shape).numel()].view(dtype).view(shape)


def _load(pickled: bytes, buffer: torch.Tensor) -> dict[str, Any]:
    contents: dict[str, Any] = _Unpickler(pickled, buffer).load()
    return contents
