"""Keys and values with room for the tokens of an answer: each is written to its place, and none before it is copied again.

Shapes: N rows that are repeated, B rows, H heads, P positions, D width of a head.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import Cache, DynamicLayer


def roomy_cache(layers: Iterable[tuple[torch.Tensor, torch.Tensor]], rows_B: torch.Tensor, room: int) -> Cache:
    """A cache that begins with chosen rows of the keys and values ``[N, H, P, D]`` of layers; ``room``: positions to come."""
    return Cache(layers=[RoomyLayer(keys, values, rows_B, room) for keys, values in layers])


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values ``[B, H, P, D]``, the first positions of longer tensors.

    ``DynamicLayer`` copies all positions for each that comes. Where the room is used up, as much is added again.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows_B: torch.Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._room = max(room, 1)
        self._all = self._with_room(keys, rows_B), self._with_room(values, rows_B)
        self._show(keys.shape[-2])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``DynamicLayer.update``: all keys and values, the given ones last."""
        start = self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        # What crops or chooses rows puts other tensors in the place of these.
        if self.keys is not self._shown or stop > self._all[0].shape[-2]:
            rows_B = torch.arange(len(self.keys), device=self.keys.device)
            self._room = max(self._room, stop - start)
            self._all = self._with_room(self.keys, rows_B), self._with_room(self.values, rows_B)
        for states, added in zip(self._all, (key_states, value_states), strict=True):
            states[..., start:stop, :] = added
        self._show(stop)
        return self.keys, self.values

    def _show(self, stop: int) -> None:
        self.keys, self.values = (states[..., :stop, :] for states in self._all)
        self._shown = self.keys

    def _with_room(self, states: torch.Tensor, rows_B: torch.Tensor) -> torch.Tensor:
        _, heads, positions, width = states.shape
        longer = states.new_empty((len(rows_B), heads, positions + self._room, width))
        longer[..., :positions, :] = states[rows_B]
        return longer
