"""Targets as the small integers that a cache stores: they are copied to the device in this form and become float32 there.

There is one function per codec. It repeats the arithmetic of the cache's decoder, operation by operation, so that both give the
same bits. Nothing here waits for the device.

Shapes: ``[.., N]`` is any padded target, N its last axis; codes of four bits are stored two per byte, ``[.., ceil(N / 2)]``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

Parts = Mapping[str, torch.Tensor]
Shape = tuple[int, ...]

_BLOCK = 64
_NATS_STEP = 32 / 255**2


@dataclass(frozen=True)
class Quantised:
    """A padded batch of one target: the ``parts`` of its ``codec``, padded with zeros, which decode to zeros.

    ``shape`` is that of the decoded target.
    """

    codec: str
    shape: Shape
    parts: Parts

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Quantised":
        """The same target with a function applied to each part, for example to move it."""
        return replace(self, parts={name: function(part) for name, part in self.parts.items()})

    def dequantise(self) -> torch.Tensor:
        """The target, float32 ``shape``, on the device of its parts."""
        return DEQUANTISERS[self.codec](self.parts, self.shape)


def _values(parts: Parts, shape: Shape) -> torch.Tensor:
    """``exact`` and ``float16``: the values themselves."""
    return parts["values"].view(shape).float()


def _int8_rows(parts: Parts, shape: Shape) -> torch.Tensor:
    """Codes times the scale of their row."""
    return parts["codes"].view(shape).float().mul_(parts["scales"].unsqueeze(-1))


def _int4_blocks(parts: Parts, shape: Shape) -> torch.Tensor:
    """Four bits of two's complement times the scale of their 64 values."""
    codes = (_nibbles(parts["codes"], shape) ^ 8).float().sub_(8)
    scales = parts["scales"].float().unsqueeze(-1)
    return codes.mul_(scales.expand(*scales.shape[:-1], _BLOCK).flatten(-2)[..., : shape[-1]])


def _sqrt8(parts: Parts, shape: Shape) -> torch.Tensor:
    """Squared codes times the step of their row."""
    return _squares(parts["codes"].view(shape), parts["scales"], levels=255)


def _sqrt4(parts: Parts, shape: Shape) -> torch.Tensor:
    """As :func:`_sqrt8`, with codes of four bits."""
    return _squares(_nibbles(parts["codes"], shape), parts["scales"], levels=15)


def _nats8(parts: Parts, shape: Shape) -> torch.Tensor:
    """Squared codes times one step for all."""
    return parts["codes"].view(shape).float().square_().mul_(_NATS_STEP)


def _squares(codes: torch.Tensor, scales: torch.Tensor, levels: int) -> torch.Tensor:
    return codes.float().square_().mul_((scales.float() / levels**2).unsqueeze(-1))


def _nibbles(packed: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Two codes per byte, the first in the low half, to uint8 ``shape``."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., : shape[-1]]


DEQUANTISERS: Mapping[str, Callable[[Parts, Shape], torch.Tensor]] = {
    "exact": _values,
    "float16": _values,
    "int8-rows": _int8_rows,
    "int4-blocks": _int4_blocks,
    "sqrt8": _sqrt8,
    "sqrt4": _sqrt4,
    "nats8": _nats8,
}
"""Every codec in which targets may be stored."""
