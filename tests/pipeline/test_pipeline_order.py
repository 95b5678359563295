"""What every order of samples must hold to, and that ``BatchOrder`` cuts its micro-batches from such an order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from reference.epoch_order import epoch_order

from alignkd.pipeline.feeding.order import BatchOrder

SHARDS = st.lists(st.integers(0, 12), min_size=1, max_size=60).map(np.asarray)
SEEDS = st.integers(0, 2**32)


@given(SHARDS, SEEDS, st.integers(0, 50), st.integers(1, 5))
def test_every_epoch_takes_every_sample_once(shards, seed, epoch, window):
    order = epoch_order(shards, seed=seed, epoch=epoch, window=window)
    assert sorted(order.tolist()) == list(range(len(shards)))


@given(SHARDS, SEEDS, st.integers(0, 50), st.integers(1, 5))
def test_the_order_depends_on_seed_and_epoch_alone(shards, seed, epoch, window):
    np.random.seed(epoch)
    first = epoch_order(shards, seed=seed, epoch=epoch, window=window)
    np.random.rand(3)
    epoch_order(shards, seed=seed + 1, epoch=epoch + 1, window=window)
    assert epoch_order(shards, seed=seed, epoch=epoch, window=window).tolist() == first.tolist()


@given(SHARDS, SEEDS, st.integers(1, 5))
def test_no_more_shards_than_the_window_are_open_at_a_time(shards, seed, window):
    visited = shards[epoch_order(shards, seed=seed, epoch=0, window=window)].tolist()
    first = {shard: visited.index(shard) for shard in visited}
    last = {shard: len(visited) - 1 - visited[::-1].index(shard) for shard in visited}
    for position in range(len(visited)):
        assert sum(first[s] <= position <= last[s] for s in first) <= window


def test_epochs_and_seeds_have_orders_of_their_own():
    shards = np.repeat(np.arange(20), 10)
    orders = {tuple(epoch_order(shards, seed=s, epoch=e, window=4).tolist()) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_the_order_is_the_same_on_every_machine_and_in_every_version():
    order = epoch_order(np.repeat(np.arange(3), 3), seed=1, epoch=2, window=2)
    assert order.tolist() == [6, 1, 0, 7, 2, 8, 5, 4, 3]


@given(SHARDS, SEEDS, st.integers(0, 50), st.integers(1, 5), st.integers(1, 9))
def test_micro_batches_are_cut_from_the_order(shards, seed, epoch, window, batch_size):
    batches = BatchOrder(shards, seed=seed, window=window, batch_size=batch_size).epoch(epoch)
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert np.concatenate(batches).tolist() == epoch_order(shards, seed=seed, epoch=epoch, window=window).tolist()
