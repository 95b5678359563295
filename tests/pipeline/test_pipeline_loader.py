"""Batches as loader processes hand them over: the same as without them, whole, named, and in shared memory."""

from __future__ import annotations

import io
import multiprocessing
import pickle
from dataclasses import fields
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from tiny_runs import IMAGES, SAMPLES, write_data

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.feeding.batch_loader import TrainingLoader
from alignkd.pipeline.feeding.dataset import MicroBatchSamples, TrainingSet
from alignkd.pipeline.feeding.feature_cache import SharedFeatures, cache_tower_features
from alignkd.pipeline.feeding.order import WINDOW_SHARDS, BatchOrder, StepSampler
from alignkd.pipeline.feeding.shared_memory import SharedMemoryBatch

ALL = frozenset({"attention", "vision", "logits"})


def training_set(vlm, data, cache):
    preparer = Preparer.of(vlm, template="v1", max_length=2048, image_root=IMAGES)
    return TrainingSet(SampleFile(data), preparer, student=vlm, reader=CacheReader(cache), needs=ALL, max_rejected=5)


def tensors(collated):
    """Every tensor of a batch and its targets, by name."""
    batch, targets = collated["batch"], collated["targets"]
    found = {field.name: value for field in fields(batch) if isinstance(value := getattr(batch, field.name), torch.Tensor)}
    for name, quantised in {**targets.attention, "vision": targets.vision_BVD, **targets.answers}.items():
        found |= {f"{name}/{part}": values for part, values in quantised.parts.items()}
    return found


def read(whole, workers, **settings):
    order = BatchOrder(whole.shard_of_sample, seed=0, window=8, batch_size=2, per_step=2)
    sampler = StepSampler(order, **{"steps": 4, "world_size": 1, "rank": 0, "accumulation": 2, **settings})
    return list(TrainingLoader(whole, sampler, workers=workers, pin_memory=False))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_give_the_batches_that_their_own_process_would(student_vlm, data, cache, workers):
    whole = training_set(student_vlm, data, cache)
    found, expected = read(whole, workers), []
    order = BatchOrder(whole.shard_of_sample, seed=0, window=8, batch_size=2, per_step=2)
    for positions in StepSampler(order, steps=4, world_size=1, rank=0, accumulation=2):
        expected.append(whole.collate([whole[i] for i in positions]))
    assert [collated["ids"] for collated in found] == [collated["ids"] for collated in expected]
    for collated, same in zip(found, expected, strict=True):
        if same["batch"] is None:
            assert collated == {
                "batch": None,
                "targets": None,
                "failures": [],
                "ids": [],
                "truncated": 0,
                "padding": 0,
                "doubtful": [],
                "written": [],
            }
            continue
        values, others = tensors(collated), tensors(same)
        assert values.keys() == others.keys()
        for name, value in values.items():
            assert (value.dtype, value.shape) == (others[name].dtype, others[name].shape)
            assert torch.equal(value, others[name])


@pytest.mark.parametrize("workers", [0, 1])
def test_micro_batches_that_an_epochs_last_step_lacks_come_as_none(student_vlm, data, cache, workers):
    found = read(training_set(student_vlm, data, cache), workers)
    assert [collated["batch"] is None for collated in found] == [False, False, False, True] * 2


@pytest.mark.parametrize("start", [0, 14])
def test_shards_are_announced_half_a_window_before_they_are_needed_and_never_of_more_than_two_windows(
    student_vlm, data, cache, start
):
    whole = training_set(student_vlm, data, cache)
    whole.shard_of_sample = shards = np.repeat(np.arange(4 * WINDOW_SHARDS), 16)
    order = BatchOrder(shards, seed=0, window=WINDOW_SHARDS, batch_size=8)  # 16 micro-batches a window, 64 an epoch
    sampler = StepSampler(order, steps=100, world_size=1, rank=0, accumulation=1, start_step=start)
    announced = list(TrainingLoader(whole, sampler, workers=0, pin_memory=False).batch_sampler)
    assert [list(positions) for positions in announced] == list(sampler)
    window_of_shard = {int(shards[i]): turn // 16 for turn, batch in enumerate(order.epoch(0)) for i in batch}
    for turn, positions in enumerate(announced[: 56 - start], start):  # after which the next epoch's are announced
        coming = {int(shards[i]) for batch in order.epoch(0)[turn + 1 : turn + 8] for i in batch}
        assert coming <= set(positions.upcoming_shards)
        assert {window_of_shard[shard] for shard in positions.upcoming_shards} <= {turn // 16, (turn + 8) // 16}
    assert announced[-1].upcoming_shards == []


@pytest.mark.parametrize(("room", "begun"), [(2 * WINDOW_SHARDS, {0, 2}), (2 * WINDOW_SHARDS - 1, {0})])
def test_announced_shards_are_opened_where_the_reader_has_room_for_two_windows(student_vlm, data, cache, room, begun):
    whole = training_set(student_vlm, data, cache)
    whole.reader.max_shards = room
    begun_here, shards = set(), whole.reader._shards
    begin = shards._future
    shards._future = lambda number: begun_here.add(number) or begin(number)
    (first,) = (int(i) for i in np.flatnonzero(whole.shard_of_sample == 0)[:1])
    items = whole.__getitems__(pickle.loads(pickle.dumps(MicroBatchSamples([first], [2]))))
    assert begun_here == begun
    assert [item.sample_id for item in items] == [whole.sample(first).id]


def test_the_ids_of_a_batch_are_in_its_order_without_those_that_failed(student_vlm, tmp_path, cache):
    records = [SAMPLES[i] for i in (3, 1, 4, 0)]
    whole = training_set(student_vlm, write_data(tmp_path / "d.json", records), cache)
    whole.preparer.image_root = tmp_path
    collated = whole.collate(whole.__getitems__([0, 1, 2, 3]))
    assert collated["ids"] == ["text4"]
    assert [failure.sample_id for failure in collated["failures"]] == ["vqa3", "vqa1", "cap0"]
    whole.preparer.image_root = IMAGES
    collated = whole.collate(whole.__getitems__([3, 0, 2]))
    assert collated["ids"] == ["cap0", "vqa3", "text4"]
    with_image = collated["batch"].vision_mask_BV.any(dim=1).tolist()
    assert with_image == [True, True, False]


def test_all_tensors_of_a_parcel_cross_as_one(student_vlm, data, cache):
    whole = training_set(student_vlm, data, cache)
    collated = whole.collate([whole[i] for i in range(6)])
    arrived = pickle.loads(pickle.dumps(collated))
    assert type(arrived) is dict
    (storage,) = {tensor.untyped_storage().data_ptr() for tensor in tensors(arrived).values()}
    assert storage
    for name, value in tensors(arrived).items():
        assert torch.equal(value, tensors(collated)[name])
        assert value.data_ptr() % 64 == arrived["batch"].input_ids_BS.data_ptr() % 64
    assert arrived["ids"] == collated["ids"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0),
        torch.zeros(3, 0, 2, dtype=torch.int64),
        torch.tensor(7, dtype=torch.uint16),
        torch.arange(24).view(2, 3, 4).transpose(0, 2),
        torch.tensor([True, False]),
        torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
    ],
    ids=["empty", "empty with a shape", "scalar", "not contiguous", "bool", "bfloat16"],
)
def test_any_tensor_survives_a_parcel(tensor):
    arrived = pickle.loads(pickle.dumps(SharedMemoryBatch(first=torch.ones(3, dtype=torch.uint8), deep=[{"it": tensor}])))[
        "deep"
    ][0]["it"]
    assert (arrived.dtype, arrived.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(arrived.view(torch.uint8) if tensor.dtype == torch.bfloat16 else arrived, _bits(tensor))


def _bits(tensor):
    return tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor


def test_tower_features_are_sent_to_a_spawned_process_as_one_shared_tensor(student_vlm, data, cache):
    whole = training_set(student_vlm, data, cache)
    cache_tower_features(student_vlm, whole, limit_bytes=2**30)
    features = whole.preparer.features
    assert isinstance(features, SharedFeatures)
    assert set(features) == {"0.png", "1.png", "2.png", "3.png"}
    sent = io.BytesIO()
    ForkingPickler(sent).dump(features)
    assert len(sent.getvalue()) < 2000 < next(iter(features.values()))[1].values.nbytes
    assert all(picture.values.is_shared() for _, picture in features.values())


def _change_first(features, done):
    next(iter(features.values()))[1].values.fill_(7.0)
    done.set()


@pytest.mark.slow
def test_a_spawned_process_sees_the_same_tower_features_and_no_copy():
    features = SharedFeatures({"a": ("x", (8, 8)), "b": ("y", (9, 7))}, torch.zeros(2, 3, 4))
    context = multiprocessing.get_context("spawn")
    done = context.Event()
    process = context.Process(target=_change_first, args=(features, done))
    process.start()
    assert done.wait(300)
    process.join()
    assert torch.equal(features["a"][1].values, torch.full((3, 4), 7.0))
    assert torch.equal(features["b"][1].values, torch.zeros(3, 4))
    assert [digest for digest, _ in features.values()] == ["x", "y"]
    assert [picture.size for _, picture in features.values()] == [(8, 8), (9, 7)]


def test_pinning_a_batch_reaches_every_tensor_of_batch_and_targets(student_vlm, data, cache, monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self) or self)
    whole = training_set(student_vlm, data, cache)
    collated = whole.collate([whole[i] for i in range(6)])
    found = pin_memory(pickle.loads(pickle.dumps(collated)))
    assert {id(tensor) for tensor in tensors(found).values()} == {id(tensor) for tensor in pinned}
    assert found["ids"] == collated["ids"]
    np.testing.assert_array_equal(found["batch"].input_ids_BS, collated["batch"].input_ids_BS)
