"""NaN and infinity in the teacher: the sample is named and rejected, the others are what they would be without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_runs import TEACHER, copy_checkpoint, record, stage_one_config, write_cache, write_data

from alignkd.cache_store.protocol.maintenance.repair import repair
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.models.checkpoints.tokenizer_files import load_tokenizer
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.data.rejected_samples import NoUsableSampleError
from alignkd.pipeline.stage_one.calibrate import NotFiniteError
from alignkd.pipeline.stage_one.dry_run import dry_run
from alignkd.pipeline.stage_one.finite import finite_logits, finite_rows
from alignkd.targets.logit_settings import LOGIT_KINDS, LogitSettings

WORDS = {"a": "a ball", "b": "a dog", "c": "a cat"}
RECORDS = [record(name, f"{i}.png", "<image>\nWhat is it?", text) for i, (name, text) in enumerate(WORDS.items())]
RECORDS.append(record("d", None, "Why?", "so"))
ONLY_IN_B = "\u2581d"


def changed(folder, name, change):
    """The golden teacher with one of its weights changed."""
    copy_checkpoint(TEACHER, folder)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(state[name])
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module", params=[float("nan"), float("inf")], ids=["nan", "inf"])
def broken_at_b(request, tmp_path_factory):
    """A teacher whose embedding of one piece, which only sample b has, is not finite."""
    piece = load_tokenizer(TEACHER).convert_tokens_to_ids(ONLY_IN_B)
    folder = tmp_path_factory.mktemp("broken") / "teacher"
    return changed(folder, "model.embed_tokens.weight", lambda weight: weight[piece].fill_(request.param))


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A teacher that float16 is too small for."""
    folder = tmp_path_factory.mktemp("overflowing") / "teacher"
    return changed(folder, "model.layers.1.mlp.down_proj.weight", lambda weight: weight.mul_(1e5))


@pytest.mark.parametrize("kind", LOGIT_KINDS)
@pytest.mark.parametrize("shard_samples", [1, 4])
def test_the_sample_alone_is_named_and_rejected(tmp_path, broken_at_b, kind, shard_samples):
    data = write_data(tmp_path / "d.json", RECORDS)
    settings = TargetSettings(logits=LogitSettings(kind))
    done = write_cache(
        data, tmp_path / "cache", teacher=str(broken_at_b), settings=settings, shard_samples=shard_samples, batch_tokens=4096
    )
    assert (done["complete"], done["samples_done"]) == (True, 3)
    assert [(sample["id"], sample["kind"]) for sample in done["rejected"]] == [("b", "not finite")]
    assert done["new_samples"] == 3


@pytest.mark.parametrize("targets", [("attention",), ("vision",), ("attention", "vision"), ("logits",)])
def test_it_is_found_whatever_the_targets_are(tmp_path, broken_at_b, targets):
    data = write_data(tmp_path / "d.json", RECORDS)
    done = write_cache(data, tmp_path / "cache", teacher=str(broken_at_b), settings=TargetSettings(targets=targets))
    assert [sample["id"] for sample in done["rejected"]] == ["b"]


def test_the_others_of_its_batch_have_the_same_bytes_as_with_a_sound_teacher(tmp_path, broken_at_b):
    data = write_data(tmp_path / "d.json", RECORDS)
    settings = TargetSettings(targets=("attention", "vision"), attention_codec="exact", vision_codec="exact")
    options = {"shard_samples": 4, "batch_tokens": 4096, "settings": settings}
    write_cache(data, tmp_path / "broken", teacher=str(broken_at_b), **options)
    write_cache(data, tmp_path / "sound", **options)
    broken, sound = CacheReader(tmp_path / "broken"), CacheReader(tmp_path / "sound")
    assert len(broken) == 3
    for key in broken:
        for name, value in broken.row(key).values.items():
            np.testing.assert_array_equal(value, sound.row(key).values[name])


def test_it_can_be_tried_again(tmp_path, broken_at_b):
    data = write_data(tmp_path / "d.json", RECORDS)
    given = {"teacher": str(broken_at_b), "shard_samples": 1}
    write_cache(data, tmp_path / "cache", **given)
    assert repair(tmp_path / "cache", retry=["text"]).samples_to_retry == {}
    done = repair(tmp_path / "cache", retry=["not finite"])
    assert (done.samples_to_retry, done.shards_to_do) == ({"not finite": 1}, 1)
    again = write_cache(data, tmp_path / "cache", **given)
    assert (again["new_samples"], again["samples_rejected"], again["complete"]) == (0, 1, True)


@pytest.mark.parametrize("kind", LOGIT_KINDS)
def test_a_teacher_that_overflows_in_float16_is_one_message_that_names_bfloat16(tmp_path, overflowing, kind):
    data = write_data(tmp_path / "d.json", RECORDS)
    settings = TargetSettings(logits=LogitSettings(kind))
    config = {"teacher": str(overflowing), "dtype": "float16", "settings": settings}
    with pytest.raises(NotFiniteError, match=r"NaN or infinity at every one of the \d+ answer tokens.*use --dtype bfloat16"):
        write_cache(data, tmp_path / "cache", **config)
    with pytest.raises(NotFiniteError, match="use --dtype bfloat16"):
        dry_run(stage_one_config(data, tmp_path / "cache", **config))
    assert not (tmp_path / "cache" / "cache.json").exists()


def test_without_a_calibration_the_reasons_are_counted_and_the_advice_is_the_same(tmp_path, overflowing):
    data = write_data(tmp_path / "d.json", RECORDS)
    settings = TargetSettings(targets=("attention", "vision"))
    with pytest.raises(NoUsableSampleError, match=r"none of 4 samples can be used: 4 not finite.*use --dtype bfloat16"):
        write_cache(data, tmp_path / "cache", teacher=str(overflowing), dtype="float16", settings=settings)


def test_a_teacher_with_one_bad_number_in_its_head_has_no_finite_answer(tmp_path):
    teacher = changed(tmp_path / "teacher", "lm_head.weight", lambda weight: weight[7].fill_(float("nan")))
    data = write_data(tmp_path / "d.json", RECORDS)
    with pytest.raises(NotFiniteError, match="Look for damaged weights"):
        write_cache(data, tmp_path / "cache", teacher=str(teacher))


def test_a_calibration_leaves_out_what_is_not_finite(tmp_path, broken_at_b):
    """The order of ids is that of the other samples, as if b were not in the data."""
    with_b, without = tmp_path / "with.json", tmp_path / "without.json"
    write_data(with_b, RECORDS), write_data(without, [one for one in RECORDS if one["id"] != "b"])
    for data in (with_b, without):
        write_cache(data, data.with_suffix(""), teacher=str(broken_at_b))
    orders = [CacheReader(data.with_suffix("")).tensors["logits.id_of_rank"] for data in (with_b, without)]
    np.testing.assert_array_equal(orders[0][:100], orders[1][:100])


def test_numbers_that_are_not_finite_are_found_in_every_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.zeros(4, 3, dtype=dtype)
        values[1, 0], values[2, 1], values[3, 2] = float("nan"), float("inf"), -float("inf")
        assert finite_rows(values).tolist() == [True, False, False, False]
        # A vocabulary may have columns that are never written: negative infinity is a logit like any other.
        assert finite_logits(values).tolist() == [True, False, False, True]
    assert finite_rows(torch.zeros(2, 0)).tolist() == [True, True]
    assert finite_logits(torch.zeros(0, 5)).tolist() == []
