"""How long samples are is known exactly, counted once, and never taken from another run's file."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_runs import IMAGES, SAMPLES, STUDENT, numbered, record, with_file, write_cache, write_data

from alignkd.cache_store.errors import CorruptShardError
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.models.loading import load_vlm
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.feeding import lengths as lengths_module
from alignkd.pipeline.feeding.dataset import TrainingExample, TrainingSet
from alignkd.pipeline.feeding.lengths import check_budget, sample_lengths

UNUSABLE = record("mute", None, "Say nothing.", "")


def training_set(vlm, data, template="v1", max_length=2048, reader=None):
    preparer = Preparer.of(vlm, template=template, max_length=max_length, image_root=IMAGES)
    return TrainingSet(SampleFile(data), preparer, student=vlm, reader=reader, needs=frozenset(), max_rejected=5)


@pytest.fixture
def counted(monkeypatch):
    """What was counted rather than read."""
    calls, real = [], lengths_module._count
    monkeypatch.setattr(lengths_module, "_count", lambda data, *rest: calls.append(len(data)) or real(data, *rest))
    return calls


def test_lengths_are_those_of_the_batches(student_vlm, tmp_path):
    whole = training_set(student_vlm, write_data(tmp_path / "d.json", [*SAMPLES, UNUSABLE]))
    lengths = sample_lengths(whole, student_vlm, tmp_path, show=False)
    assert lengths.dtype == np.int32
    for position, length in enumerate(lengths.tolist()):
        item = whole[position]
        if isinstance(item, TrainingExample):
            assert whole.collate([item])["batch"].input_ids_BS.shape == (1, length)
        else:
            assert (whole.sample(position).id, length) == ("mute", 0)


def test_lengths_are_kept_and_read_again(student_vlm, tmp_path, counted, data):
    first = sample_lengths(training_set(student_vlm, data), student_vlm, tmp_path, show=False)
    again = sample_lengths(training_set(student_vlm, data), student_vlm, tmp_path, show=False)
    np.testing.assert_array_equal(first, again)
    assert counted == [6]
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


@pytest.mark.parametrize("damage", ["cut short", "empty", "no array", "of other samples"])
def test_a_damaged_file_of_lengths_is_counted_anew_and_mended(student_vlm, tmp_path, counted, data, damage):
    first = sample_lengths(training_set(student_vlm, data), student_vlm, tmp_path, show=False)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes({"cut short": whole[:-3], "empty": b"", "no array": b"text" * 99}.get(damage, whole))
    if damage == "of other samples":
        np.save(path, first[:-1])
    np.testing.assert_array_equal(sample_lengths(training_set(student_vlm, data), student_vlm, tmp_path, show=False), first)
    assert path.read_bytes() == whole
    assert counted == [6, 6]


@pytest.mark.parametrize("change", ["template", "maximum length", "samples", "tokenizer", "vision tokens"])
def test_whatever_changes_lengths_makes_them_be_counted_anew(student_vlm, tmp_path, counted, data, change):
    kept = tmp_path / "kept"
    first = sample_lengths(training_set(student_vlm, data), student_vlm, kept, show=False)
    vlm, settings = student_vlm, {}
    if change == "template":
        settings = {"template": "plain"}
    elif change == "maximum length":
        settings = {"max_length": 60}
    elif change == "samples":
        data = write_data(tmp_path / "other.json", [*SAMPLES[:-1], TWICE])
    elif change == "tokenizer":
        vlm = load_vlm(with_file(STUDENT, tmp_path / "student", "tokenizer_config.json", add_bos_token=False))
    other = training_set(vlm, data, **settings)
    if change == "vision tokens":
        other.preparer.encoder.tokens_per_placeholder = 36
        vlm = replace(vlm, model=SimpleNamespace(config=SimpleNamespace(vision_tokens_per_image=36)))
    second = sample_lengths(other, vlm, kept, show=False)
    assert counted == [6, 6]
    assert second.tolist() != first.tolist()


@pytest.mark.parametrize("shard_format", ["zarr", "webdataset"])
def test_the_lengths_of_cached_rows_are_those_that_counting_finds_and_nothing_is_tokenised(
    student_vlm, tmp_path, counted, shard_format
):
    records = [*SAMPLES, record("broken6", "no-such.png", "<image>\nWhat?", "Nothing."), *numbered(9)]
    data = write_data(tmp_path / "d.json", records)
    write_cache(data, tmp_path / "cache", shard_format=shard_format, max_rejected=1)
    cached = training_set(student_vlm, data, reader=CacheReader(tmp_path / "cache"))
    lengths = sample_lengths(cached, student_vlm, tmp_path / "cached", show=False)
    assert counted == []
    plain = training_set(student_vlm, write_data(tmp_path / "usable.json", [r for r in records if r["id"] != "broken6"]))
    np.testing.assert_array_equal(lengths, sample_lengths(plain, student_vlm, tmp_path / "plain", show=False))
    assert counted == [15]
    assert cached.text_only.tolist() == [not sample.images for sample in map(cached.sample, range(len(cached)))]


@pytest.mark.parametrize("change", [{"template": "plain"}, {"max_length": 60}])
def test_rows_with_other_ids_than_the_samples_are_not_taken_for_their_lengths(student_vlm, tmp_path, counted, data, change):
    write_cache(data, tmp_path / "cache")
    other = training_set(student_vlm, data, reader=CacheReader(tmp_path / "cache"), **change)
    sample_lengths(other, student_vlm, tmp_path / "kept", show=False)
    assert counted == [6]


def test_a_shard_that_is_missing_or_cut_short_is_named_when_lengths_are_read(student_vlm, tmp_path, data):
    write_cache(data, tmp_path / "cache")
    cached = training_set(student_vlm, data, reader=CacheReader(tmp_path / "cache"))
    (path,) = (tmp_path / "cache" / "shards").glob("000001-*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(CorruptShardError, match=rf"shard 1 of the cache.*found {len(whole) - 5} bytes.*alignkd cache repair"):
        sample_lengths(cached, student_vlm, tmp_path / "kept", show=False)
    path.unlink()
    with pytest.raises(CorruptShardError, match="it is missing"):
        sample_lengths(cached, student_vlm, tmp_path / "kept", show=False)


TWICE = record("twice", None, "What is two and two?", "Four. " * 5)


def test_worker_processes_count_the_same(student_vlm, tmp_path, monkeypatch):
    whole = training_set(student_vlm, write_data(tmp_path / "d.json", [*numbered(40), UNUSABLE]))
    alone = sample_lengths(whole, student_vlm, tmp_path / "alone", show=False)
    monkeypatch.setattr(lengths_module, "_FEW", 0)
    monkeypatch.setattr(lengths_module, "_CHUNK", 7)
    np.testing.assert_array_equal(sample_lengths(whole, student_vlm, tmp_path / "two", workers=2, show=False), alone)


def test_a_sample_over_the_budget_is_refused_by_name_and_length_with_the_way_out(student_vlm, data):
    whole = training_set(student_vlm, data)
    lengths = np.asarray([100, 200, 300, 250, 30, 20])
    check_budget(whole, lengths, 300)
    words = (
        r"sample 'multi2' takes 300 positions with its images, more than --batch-tokens 220, as do 2 of 6 samples in all;"
        r" give --batch-tokens 300 or more, or a smaller --max-length"
    )
    with pytest.raises(ValueError, match=words):
        check_budget(whole, lengths, 220)
