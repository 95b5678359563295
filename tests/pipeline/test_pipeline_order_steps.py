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
def batch_orders(draw, kinds=("plain", "grouped", "budget", "both"), per_steps=range(1, 7)):
    shards, kind = draw(SHARDS), draw(st.sampled_from(kinds))
    lengths = np.asarray(draw(st.lists(st.integers(0, BUDGET), min_size=len(shards), max_size=len(shards))))
    budget = BUDGET if kind in ("budget", "both") else None
    return BatchOrder(
        shards,
        seed=draw(st.integers(0, 2**32)),
        window=draw(st.integers(1, 4)),
        batch_size=draw(st.integers(1, 7) if budget is None else st.none() | st.integers(1, 7)),
        per_step=draw(st.sampled_from(per_steps)),
        lengths=None if kind == "plain" else lengths,
        group_by_length=kind in ("grouped", "both"),
        batch_tokens=budget,
        text_only=draw(st.none() | st.just(lengths < BUDGET // 4)),
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


@given(batch_orders(per_steps=(1, 2, 4, 6)), st.integers(1, 3))
def test_any_split_into_processes_and_accumulation_reads_the_same_at_every_step(order_and_lengths, epochs):
    order, lengths = order_and_lengths
    steps, per_step = order.total_steps(epochs), order.per_step
    splits = [(world, per_step // world) for world in range(1, per_step + 1) if per_step % world == 0]
    first, *others = (read(order, steps=steps, world=world, accumulation=accumulation) for world, accumulation in splits)
    assert all(other == first for other in others)
    seen = np.bincount([sample for step in first for batch in step for sample in batch], minlength=len(lengths))
    assert seen.tolist() == [epochs] * len(lengths)


@given(batch_orders(), st.data())
def test_from_any_step_on_a_run_reads_what_it_would_have_read(order_and_lengths, data):
    order, _ = order_and_lengths
    world = data.draw(st.sampled_from([n for n in range(1, order.per_step + 1) if order.per_step % n == 0]))
    accumulation = order.per_step // world
    steps = data.draw(st.integers(1, order.total_steps(3)))
    start = data.draw(st.integers(0, steps))
    whole = read(order, steps=steps, world=world, accumulation=accumulation)
    assert read(order, steps=steps, world=world, accumulation=accumulation, start=start) == whole[start:]


@given(batch_orders(), st.integers(1, 3))
def test_no_step_mixes_two_epochs(order_and_lengths, epochs):
    order, lengths = order_and_lengths
    steps = read(order, steps=order.total_steps(epochs), world=order.per_step, accumulation=1)
    for epoch in range(epochs):
        mine, steps = steps[: order.steps_per_epoch(epoch)], steps[order.steps_per_epoch(epoch) :]
        assert sorted(sample for step in mine for batch in step for sample in batch) == list(range(len(lengths)))
        assert all(batch for step in mine[:-1] for batch in step)
        assert mine[-1][0]
    assert steps == []


@given(SHARDS, st.integers(0, 99), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_two_processes_read_at_a_step_what_one_reads_with_twice_the_batch(shards, seed, batch_size, accumulation, group):
    settings = {"seed": seed, "window": 2, "group_by_length": group, "lengths": np.arange(len(shards)) % 7}
    one = BatchOrder(shards, batch_size=2 * batch_size, per_step=accumulation, **settings)
    two = BatchOrder(shards, batch_size=batch_size, per_step=2 * accumulation, **settings)
    steps = one.total_steps(2)
    assert two.total_steps(2) == steps
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


@given(batch_orders(["grouped"]), st.integers(0, 3))
def test_grouping_leaves_all_micro_batches_equal_but_those_of_the_last_step(order_and_lengths, epoch):
    order, lengths = order_and_lengths
    batches, size = order.epoch(epoch), order._batch_size
    assert len(batches) == -(-len(lengths) // size)
    assert {len(batch) for batch in batches[:-1]} <= {size}


@given(batch_orders(["grouped", "both"]), st.integers(0, 3))
def test_grouping_needs_the_shards_of_one_window_and_between_two_windows_those_of_the_step(order_and_lengths, epoch):
    order, _ = order_and_lengths
    batches = order.epoch(epoch)
    steps = [np.concatenate(batches[i : i + order.per_step]) for i in range(0, len(batches), order.per_step)]
    shards = [set(order._shards[step].tolist()) for step in steps]
    first = {shard: i for i, mine in reversed(list(enumerate(shards))) for shard in mine}
    last = {shard: i for i, mine in enumerate(shards) for shard in mine}
    opened = [{shard for shard in first if first[shard] <= i <= last[shard]} for i in range(len(steps))]
    for mine, needed in zip(shards, opened, strict=True):
        assert len(needed) <= order._window or needed == mine


def test_a_budget_is_filled_as_far_as_the_next_sample_allows():
    lengths = np.asarray([10, 10, 10, 10, 25, 40, 5])
    order = BatchOrder(np.zeros(7, dtype=int), seed=0, window=1, batch_size=None, lengths=lengths, batch_tokens=40)
    batches = order.epoch(0)
    for batch, following in pairwise(batches):
        with_next = [*batch, following[0]]
        assert len(with_next) * lengths[with_next].max() > 40


def _mixed_lengths(samples, seed=0):
    """Positions and kind of samples of a mix like LLaVA's: short answers, conversations, descriptions, long texts."""
    generator = np.random.default_rng(seed)
    kinds = np.array([(100, 0.35, 0.45), (365, 0.45, 0.30), (148, 0.5, 0.18), (665, 0.7, 0.07)])
    kind = generator.choice(4, size=samples, p=kinds[:, 2])
    tokens = np.exp(np.log(kinds[kind, 0]) + kinds[kind, 1] * generator.standard_normal(samples))
    return np.minimum(2048, tokens).astype(np.int32) + 144, kind


def _computed(order, lengths, world=1, epoch=0):
    """Positions that are computed or waited for, for every real one: those that run at once take as long as the longest."""
    work = [len(batch) * int(lengths[batch].max()) for batch in order.epoch(epoch)]
    together = [work[i : i + world] for i in range(0, len(work), world)]
    return sum(world * max(each) for each in together) / lengths.sum()


@pytest.mark.parametrize("batch_tokens", [None, 8192])
@pytest.mark.parametrize(("batch_size", "plain"), [(8, 2.1), (16, 2.6), (32, 3.2)])
def test_grouping_by_length_leaves_little_padding_on_a_real_mix(batch_size, plain, batch_tokens):
    lengths, _ = _mixed_lengths(40_000)
    settings = {"seed": 0, "window": 8, "batch_size": batch_size, "lengths": lengths}
    shards = np.arange(40_000) // 512
    without = _computed(BatchOrder(shards, **settings), lengths)
    grouped = _computed(BatchOrder(shards, **settings, group_by_length=True, batch_tokens=batch_tokens), lengths)
    assert without > plain
    assert grouped < 1.08


def test_processes_have_like_work_at_every_moment_of_a_step():
    lengths, _ = _mixed_lengths(40_000)
    settings = {"seed": 0, "window": 8, "batch_size": 16, "lengths": lengths}
    for world, accumulation in ((8, 1), (4, 4)):
        settings["per_step"] = world * accumulation
        assert _computed(BatchOrder(np.arange(40_000) // 512, **settings), lengths, world) > 3
        grouped = BatchOrder(np.arange(40_000) // 512, **settings, group_by_length=True)
        assert _computed(grouped, lengths, world) < 1.2


@pytest.mark.parametrize("per_step", [1, 8])
@pytest.mark.parametrize(("where", "samples", "parts"), [("mixed", 40_000, 10), ("at the end of the file", 160_000, 5)])
def test_text_without_images_and_each_length_come_in_proportion_all_through_an_epoch(per_step, where, samples, parts):
    lengths, kind = _mixed_lengths(samples)
    text_only = kind == 3
    lengths = lengths - 144 * text_only
    if where == "at the end of the file":
        by_kind = np.argsort(text_only, kind="stable")
        lengths, text_only = lengths[by_kind], text_only[by_kind]
    shards = np.arange(samples) // 512
    settings = {"seed": 0, "window": 8, "batch_size": 16, "per_step": per_step, "lengths": lengths}
    batches = BatchOrder(shards, **settings, group_by_length=True, text_only=text_only).epoch(0)
    in_turn = np.array_split(np.concatenate(batches), parts)
    assert [text_only[part].mean() for part in in_turn] == pytest.approx([text_only.mean()] * parts, rel=0.35)
    assert [lengths[part].mean() for part in in_turn] == pytest.approx([lengths.mean()] * parts, rel=0.12)
    steps = [text_only[np.concatenate(batches[i : i + per_step])].mean() for i in range(0, len(batches), per_step)]
    mostly_text = "".join("01"[int(share > 0.5)] for share in steps)
    assert "1" * 5 not in mostly_text


def test_grouped_steps_differ_between_epochs_and_come_in_a_random_order():
    lengths, _ = _mixed_lengths(2000)
    order = BatchOrder(np.zeros(2000, dtype=int), seed=0, window=8, batch_size=16, lengths=lengths, group_by_length=True)
    first, second = ({tuple(sorted(batch.tolist())) for batch in order.epoch(epoch)} for epoch in (0, 1))
    assert len(first & second) < 0.1 * len(first)
    means = [lengths[batch].mean() for batch in order.epoch(0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_samples_of_nearly_one_length_are_not_grouped_as_that_would_mix_them_less():
    generator, shards = np.random.default_rng(0), np.arange(4000) // 512
    for spread, grouped in ((0.05, False), (0.4, True)):
        lengths = np.exp(generator.normal(5, spread, 4000)).astype(np.int32)
        settings = {"seed": 0, "window": 8, "batch_size": 16, "lengths": lengths}
        plain, chosen = (BatchOrder(shards, **settings, group_by_length=group).epoch(0) for group in (False, True))
        assert all(map(np.array_equal, plain, chosen)) is not grouped
        assert grouped or _computed(BatchOrder(shards, **settings), lengths) < 1.11


def test_samples_of_unknown_length_are_spread_over_the_others():
    lengths, _ = _mixed_lengths(2000)
    unknown = np.arange(0, 2000, 8)
    lengths[unknown] = 0
    order = BatchOrder(np.zeros(2000, dtype=int), seed=0, window=8, batch_size=16, lengths=lengths, group_by_length=True)
    assert max(np.isin(batch, unknown).mean() for batch in order.epoch(0)) < 0.6


def test_the_order_of_an_epoch_is_computed_once_when_it_is_begun(monkeypatch):
    computed, real = [], BatchOrder._batches
    monkeypatch.setattr(BatchOrder, "_batches", lambda self, epoch: computed.append(epoch) or real(self, epoch))
    lengths, _ = _mixed_lengths(30)
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
    assert [order.total_steps(epochs) for epochs in (0.01, 0.1, 1.0, 1.1, 2.5, 0.3)] == [1, 1, 10, 11, 25, 3]
    assert BatchOrder(np.zeros(100, dtype=int), seed=0, window=1, batch_size=10, per_step=3).total_steps(2.0) == 8


def test_the_samples_of_every_step_are_the_same_on_every_machine_and_in_every_version():
    shards, lengths = np.repeat(np.arange(3), 3), np.asarray([9, 2, 7, 4, 6, 3, 8, 5, 1])
    found = {}
    for group, budget in product((False, True), (None, 12)):
        order = BatchOrder(shards, seed=1, window=2, batch_size=2, lengths=lengths, group_by_length=group, batch_tokens=budget)
        found[group, budget] = [batch.tolist() for batch in order.epoch(2)]
    assert found == {
        (False, None): [[6, 1], [0, 7], [2, 8], [5, 4], [3]],
        (False, 12): [[6], [1], [0], [7], [2], [8, 5], [4, 3]],
        (True, None): [[8, 1], [6, 0], [7, 2], [5, 3], [4]],
        (True, 12): [[0], [7], [6], [2], [8, 1], [4], [5, 3]],
    }


def test_the_time_to_lay_out_an_epoch_grows_no_faster_than_its_samples():
    """This takes a fraction of a second; if it grew with the square of the samples, it would take hours."""
    shards, lengths = np.arange(200_000) // 512, _mixed_lengths(200_000)[0]
    for settings in ({}, {"group_by_length": True}, {"group_by_length": True, "batch_tokens": 8192}):
        epoch = BatchOrder(shards, seed=0, window=8, batch_size=16, lengths=lengths, **settings).epoch(0)
        assert len(np.unique(np.concatenate(list(epoch)))) == 200_000
