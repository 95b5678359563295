"""A batch on its way from a loader process: all of its tensors in one piece of shared memory.

Left alone, every tensor crosses as shared memory of its own, some thirty a batch, and the process that trains has to ask the
one that loads, which is busy, for each.
"""

import io
import pickle
from typing import Any

import torch

_ALIGN = 64
"""Bytes: every dtype may begin there, and so does a cache line."""

_Place = tuple[int, torch.dtype, tuple[int, ...]]


class SharedMemoryBatch(dict[str, Any]):
    """A dict of anything. Pickled, it arrives as a plain dict whose tensors, however deep, are views of one buffer."""

    def __reduce__(self) -> tuple[Any, ...]:
        words = io.BytesIO()
        packer = _Packer(words, protocol=pickle.HIGHEST_PROTOCOL)
        packer.dump(dict(self))
        return _unpack, (words.getvalue(), packer.buffer())


class _Packer(pickle.Pickler):
    """Leaves a note of its place where a tensor was."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._tensors: list[tuple[_Place, torch.Tensor]] = []
        self._bytes = 0

    def persistent_id(self, value: Any) -> _Place | None:
        """Where in the buffer a tensor lies."""
        if not isinstance(value, torch.Tensor):
            return None
        place = self._bytes, value.dtype, tuple(value.shape)
        self._tensors.append((place, value))
        self._bytes += -(-value.nbytes // _ALIGN) * _ALIGN
        return place

    def buffer(self) -> torch.Tensor:
        """All tensors, one after the other."""
        buffer = torch.empty(self._bytes, dtype=torch.uint8)
        for place, tensor in self._tensors:
            _view(buffer, place).copy_(tensor)
        return buffer


class _Unpacker(pickle.Unpickler):
    def __init__(self, words: bytes, buffer: torch.Tensor) -> None:
        super().__init__(io.BytesIO(words))
        self._buffer = buffer

    def persistent_load(self, place: _Place) -> torch.Tensor:
        """The tensor at a place."""
        return _view(self._buffer, place)


def _view(buffer: torch.Tensor, place: _Place) -> torch.Tensor:
    start, dtype, shape = place
    return buffer[start : start + dtype.itemsize * torch.Size(shape).numel()].view(dtype).view(shape)


def _unpack(words: bytes, buffer: torch.Tensor) -> dict[str, Any]:
    contents: dict[str, Any] = _Unpacker(words, buffer).load()
    return contents
