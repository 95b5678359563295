"""A cache with room holds what the library's growing one holds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from alignkd.pipeline.evaluate.roomy_cache import roomy_cache

ROWS = torch.tensor([1, 0, 1])


def states(seed: int, rows: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randn(2, rows, 2, positions, 3, generator=torch.Generator().manual_seed(seed))
    return drawn[0], drawn[1]


@given(st.integers(0, 4), st.lists(st.integers(1, 4), max_size=5))
def test_it_holds_what_the_growing_cache_holds_whatever_the_room(room: int, steps: list[int]) -> None:
    shared = [states(layer, 2, 4) for layer in range(2)]
    roomy, growing = roomy_cache(shared, ROWS, room), DynamicCache()
    for layer, (keys, values) in enumerate(shared):
        growing.update(keys[ROWS], values[ROWS], layer)
    for number, positions in enumerate(steps):
        for layer in range(2):
            added = states(10 * number + layer + 2, len(ROWS), positions)
            for found, expected in zip(roomy.update(*added, layer), growing.update(*added, layer), strict=True):
                assert torch.equal(found, expected)
        assert roomy.get_seq_length() == growing.get_seq_length() == 4 + sum(steps[: number + 1])
    assert torch.equal(shared[0][0], states(0, 2, 4)[0]), "what is shared stays as it was"


@pytest.mark.parametrize("change", ["crop", "choose"])
def test_it_goes_on_from_what_was_cropped_or_chosen(change: str) -> None:
    shared = [states(0, 2, 4)]
    roomy, growing = roomy_cache(shared, ROWS, 8), DynamicCache()
    growing.update(shared[0][0][ROWS], shared[0][1][ROWS], 0)
    for cache in (roomy, growing):
        cache.update(*states(1, len(ROWS), 2), 0)
        if change == "crop":
            cache.crop(-1)
        else:
            cache.batch_select_indices(torch.tensor([2, 0]))
    added = states(2, len(ROWS) if change == "crop" else 2, 1)
    for found, expected in zip(roomy.update(*added, 0), growing.update(*added, 0), strict=True):
        assert torch.equal(found, expected)
