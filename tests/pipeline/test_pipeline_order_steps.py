"""Micro-batches and steps: which samples a step learns from, on how many processes ever, from whatever step on."""

from __future__ import annotations

from itertools import islice, pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.epoch_order import epoch_order

from alignkd.pipeline.feeding.order import BatchOrder, StepSampler

SHARDS = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(np.asarray)
BUDGET = 40


@st.composite
def batch_orders(draw, kinds=("plain", "grouped", "budget", "both")):
    shards, kind = draw(SHARDS), draw(st.sampled_from(kinds))
    lengths = np.asarray(draw(st.lists(st.integers(0, BUDGET), min_size=len(shards), max_size=len(shards))))
    budget = BUDGET if kind in ("budget", "both") else None
    return BatchOrder(
        shards,
        seed=draw(st.integers(0, 2**32)),
        window=draw(st.integers(1, 4)),
        batch_size=draw(st.integers(1, 7) if budget is None else st.none() | st.integers(1, 7)),
        lengths=None if kind == "plain" else lengths,
        group_by_length=kind in ("grouped", "both"),
        batch_tokens=budget,
    ), lengths


def read(order, *, steps, world, accumulation, start=0):
    """What each step reads: its micro-batches in the order of (accumulation, rank)."""
    samplers = [
        StepSampler(order, steps=steps, world_size=world, rank=rank, accumulation=accumulation, start_step=start)
        for rank in range(world)
    ]
    assert all(len(sampler) == steps * accumulation for sampler in samplers)
    read_by_rank = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in read_by_rank} == {(steps - start) * accumulation}
    in_turn = [batch for together in zip(*read_by_rank, strict=True) for batch in together]
    return [in_turn[i : i + world * accumulation] for i in range(0, len(in_turn), world * accumulation)]


@given(batch_orders(), st.integers(0, 3))
def test_every_sample_is_in_one_micro_batch_of_every_epoch(order_and_lengths, epoch):
    order, lengths = order_and_lengths
    batches = order.epoch(epoch)
    assert all(len(batch) for batch in batches)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))


@given(batch_orders(), st.integers(1, 3), st.sampled_from([1, 2, 4, 6]))
def test_any_split_into_processes_and_accumulation_reads_the_same_at_every_step(order_and_lengths, epochs, per_step):
    order, lengths = order_and_lengths
    steps = order.total_steps(epochs, per_step)
    splits = [(world, per_step // world) for world in range(1, per_step + 1) if per_step % world == 0]
    first, *others = (read(order, steps=steps, world=world, accumulation=accumulation) for world, accumulation in splits)
    assert all(other == first for other in others)
    seen = np.bincount([sample for step in first for batch in step for sample in batch], minlength=len(lengths))
    assert seen.tolist() == [epochs] * len(lengths)


@given(batch_orders(), st.integers(1, 3), st.integers(1, 3), st.data())
def test_from_any_step_on_a_run_reads_what_it_would_have_read(order_and_lengths, world, accumulation, data):
    order, _ = order_and_lengths
    steps = data.draw(st.integers(1, order.total_steps(3, world * accumulation)))
    start = data.draw(st.integers(0, steps))
    whole = read(order, steps=steps, world=world, accumulation=accumulation)
    assert read(order, steps=steps, world=world, accumulation=accumulation, start=start) == whole[start:]


@given(batch_orders(), st.integers(1, 5), st.integers(1, 3))
def test_no_step_mixes_two_epochs(order_and_lengths, per_step, epochs):
    order, lengths = order_and_lengths
    steps = read(order, steps=order.total_steps(epochs, per_step), world=per_step, accumulation=1)
    for epoch in range(epochs):
        mine, steps = steps[: order.steps_per_epoch(epoch, per_step)], steps[order.steps_per_epoch(epoch, per_step) :]
        assert sorted(sample for step in mine for batch in step for sample in batch) == list(range(len(lengths)))
        assert all(batch for step in mine[:-1] for batch in step)
        assert mine[-1][0]
    assert steps == []


@given(SHARDS, st.integers(0, 99), st.integers(1, 4), st.integers(1, 3))
def test_two_processes_read_at_a_step_what_one_reads_with_twice_the_batch(shards, seed, batch_size, accumulation):
    one = BatchOrder(shards, seed=seed, window=2, batch_size=2 * batch_size)
    two = BatchOrder(shards, seed=seed, window=2, batch_size=batch_size)
    steps = one.total_steps(2, accumulation)
    assert two.total_steps(2, 2 * accumulation) == steps
    alone = read(one, steps=steps, world=1, accumulation=accumulation)
    together = read(two, steps=steps, world=2, accumulation=accumulation)
    for step, other in zip(alone, together, strict=True):
        assert [sample for batch in step for sample in batch] == [sample for batch in other for sample in batch]


@given(SHARDS, st.integers(0, 99), st.integers(0, 9), st.integers(1, 7))
def test_without_grouping_micro_batches_are_the_epochs_order(shards, seed, epoch, batch_size):
    batches = BatchOrder(shards, seed=seed, window=2, batch_size=batch_size).epoch(epoch)
    np.testing.assert_array_equal(np.concatenate(batches), epoch_order(shards, seed=seed, epoch=epoch, window=2))
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}


@given(batch_orders(["budget", "both"]), st.integers(0, 3))
def test_no_micro_batch_holds_more_positions_than_its_budget_or_more_samples_than_asked_for(order_and_lengths, epoch):
    order, lengths = order_and_lengths
    for batch in order.epoch(epoch):
        assert len(batch) * lengths[batch].max() <= BUDGET
        assert len(batch) <= (order._batch_size or BUDGET)


@given(batch_orders(["grouped", "both"]), st.integers(0, 3))
def test_grouping_needs_no_more_open_shards_than_the_window(order_and_lengths, epoch):
    order, _ = order_and_lengths
    visited = order._shards[np.concatenate(order.epoch(epoch))].tolist()
    first = {shard: visited.index(shard) for shard in visited}
    last = {shard: len(visited) - 1 - visited[::-1].index(shard) for shard in visited}
    for position in range(len(visited)):
        assert sum(first[s] <= position <= last[s] for s in first) <= order._window


def test_a_budget_is_filled_as_far_as_the_next_sample_allows():
    lengths = np.asarray([10, 10, 10, 10, 25, 40, 5])
    order = BatchOrder(np.zeros(7, dtype=int), seed=0, window=1, batch_size=None, lengths=lengths, batch_tokens=40)
    batches = order.epoch(0)
    for batch, following in pairwise(batches):
        with_next = [*batch, following[0]]
        assert len(with_next) * lengths[with_next].max() > 40


def _caption_lengths(samples):
    return np.clip(np.random.default_rng(0).lognormal(5, 0.6, samples), 20, 2048).astype(np.int32)


def _padding(order, lengths, epoch=0):
    """Share of positions that are padding."""
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in order.epoch(epoch))
    return 1 - lengths.sum() / padded


@pytest.mark.parametrize("batch_tokens", [None, 8192])
def test_grouping_by_length_leaves_little_padding(batch_tokens):
    shards, lengths = np.repeat(np.arange(20), 500), _caption_lengths(10_000)
    settings = {"seed": 0, "window": 8, "batch_size": 16, "lengths": lengths, "batch_tokens": batch_tokens}
    without = _padding(BatchOrder(shards, **settings), lengths)
    grouped = _padding(BatchOrder(shards, **settings, group_by_length=True), lengths)
    assert without > 0.4
    assert grouped < 0.08


def test_grouped_micro_batches_differ_between_epochs_and_come_in_a_random_order():
    lengths = _caption_lengths(2000)
    order = BatchOrder(np.zeros(2000, dtype=int), seed=0, window=8, batch_size=16, lengths=lengths, group_by_length=True)
    first, second = ({tuple(sorted(batch.tolist())) for batch in order.epoch(epoch)} for epoch in (0, 1))
    assert len(first & second) < 0.1 * len(first)
    means = [lengths[batch].mean() for batch in order.epoch(0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_the_order_of_an_epoch_is_computed_once_when_it_is_begun(monkeypatch):
    computed, real = [], BatchOrder._batches
    monkeypatch.setattr(BatchOrder, "_batches", lambda self, epoch: computed.append(epoch) or real(self, epoch))
    lengths = _caption_lengths(30)
    for group in (False, True):
        computed.clear()
        order = BatchOrder(np.zeros(30, int), seed=0, window=1, batch_size=3, lengths=lengths, group_by_length=group)
        batches = iter(StepSampler(order, steps=25, world_size=1, rank=0, accumulation=1))
        assert computed == []
        list(islice(batches, 10))
        assert computed == [0]
        list(batches)
        assert computed == [0, 1, 2]


def test_steps_of_a_part_of_an_epoch_are_rounded_up_but_not_by_a_rounding_error():
    order = BatchOrder(np.zeros(100, dtype=int), seed=0, window=1, batch_size=10)
    assert [order.total_steps(epochs, 1) for epochs in (0.01, 0.1, 1.0, 1.1, 2.5, 0.3)] == [1, 1, 10, 11, 25, 3]
    assert order.total_steps(2.0, 3) == 8


def test_the_samples_of_every_step_are_the_same_on_every_machine_and_in_every_version():
    shards, lengths = np.repeat(np.arange(3), 3), np.asarray([9, 2, 7, 4, 6, 3, 8, 5, 1])
    found = {}
    for group, budget in product((False, True), (None, 12)):
        order = BatchOrder(shards, seed=1, window=2, batch_size=2, lengths=lengths, group_by_length=group, batch_tokens=budget)
        found[group, budget] = [batch.tolist() for batch in order.epoch(2)]
    assert found == {
        (False, None): [[6, 1], [0, 7], [2, 8], [5, 4], [3]],
        (False, 12): [[6], [1], [0], [7], [2], [8, 5], [4, 3]],
        (True, None): [[7, 2], [6, 0], [8, 1], [4], [5, 3]],
        (True, 12): [[0], [7], [6], [2], [8, 1], [4], [5, 3]],
    }


def test_the_time_to_lay_out_an_epoch_grows_no_faster_than_its_samples():
    """This takes a fraction of a second; if it grew with the square of the samples, it would take hours."""
    shards, lengths = np.arange(200_000) // 512, _caption_lengths(200_000)
    for settings in ({}, {"group_by_length": True}, {"group_by_length": True, "batch_tokens": 8192}):
        epoch = BatchOrder(shards, seed=0, window=8, batch_size=16, lengths=lengths, **settings).epoch(0)
        assert len(np.unique(np.concatenate(list(epoch)))) == 200_000
