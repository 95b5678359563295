"""What stage two takes from cache and data, and what it refuses."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from reference.epoch_order import epoch_order
from tiny_runs import (
    IMAGES,
    SAMPLES,
    STUDENT,
    TEACHER,
    metrics,
    stage_two_config,
    student_sha256,
    train,
    with_vocabulary,
    write_cache,
    write_data,
)

from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.data.rejected_samples import TooManyRejectedError
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.feeding.row_checks import MisalignedRowError
from alignkd.pipeline.training.run import distill


def test_tower_features_that_do_not_fit_into_memory_are_refused(data, cache, tmp_path):
    with pytest.raises(ValueError, match=r"--cache-tower-features needs .* GiB for 4 images.*remove the option"):
        train(data, cache, tmp_path / "out", cache_tower_features=True, feature_bytes=1000)


@pytest.mark.slow
def test_a_cache_of_head_means_trains_head_means_and_refuses_heads(data, tmp_path):
    write_cache(data, tmp_path / "cache", settings=TargetSettings(attention="mean"))
    train(data, tmp_path / "cache", tmp_path / "out", max_steps=1, overrides={"head_map": "mean"})
    assert metrics(tmp_path / "out")[0]["attention"] > 0
    with pytest.raises(ValueError, match="use --set head_map=mean, or cache with --attention per-head"):
        train(data, tmp_path / "cache", tmp_path / "other")


def test_data_reordered_and_filtered_between_the_stages_trains(cache, tmp_path):
    data = write_data(tmp_path / "other.json", [SAMPLES[i] for i in (5, 1, 3, 0)])
    assert train(data, cache, tmp_path / "out", epochs=1.0)["samples"] == 4


def test_samples_come_in_the_order_of_seed_and_epoch_where_they_are_not_grouped(data, cache, tmp_path, monkeypatch):
    seen, real = [], TrainingSet.__getitem__
    monkeypatch.setattr(TrainingSet, "__getitem__", lambda self, i: seen.append(i) or real(self, i))
    train(data, cache, tmp_path / "out", epochs=3.0, seed=3, group_by_length=False)
    shards = np.asarray([0, 0, 1, 1, 2, 2])
    expected = [i for epoch in range(3) for i in epoch_order(shards, seed=3, epoch=epoch, window=8).tolist()]
    assert seen == expected


def test_what_stage_one_rejected_is_left_out_named_and_capped(tmp_path):
    bad = [{**SAMPLES[0], "id": f"bad{i}", "image": "none.png"} for i in range(3)]
    data = write_data(tmp_path / "d.json", [*bad, *SAMPLES[:3]])
    write_cache(data, tmp_path / "cache")
    result = train(data, tmp_path / "cache", tmp_path / "out", epochs=1.0)
    assert (result["samples"], result["rejected"]) == (3, 3)
    assert set(result["rejected_samples"]) == {"bad0", "bad1", "bad2"}
    with pytest.raises(TooManyRejectedError, match="more than --max-rejected 2"):
        train(data, tmp_path / "cache", tmp_path / "other", epochs=1.0, max_rejected=2)


@pytest.mark.slow
def test_an_image_that_vanished_since_stage_one_is_left_out_and_one_that_changed_ends_the_run(data, cache, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(IMAGES, images)
    (images / "1.png").unlink()
    result = train(data, cache, tmp_path / "out", images=str(images), epochs=1.0)
    assert (result["samples"], set(result["rejected_samples"])) == (5, {"vqa1"})
    shutil.copyfile(images / "0.png", images / "1.png")
    with pytest.raises(MisalignedRowError, match="'vqa1' does not match its row in the cache: its image file differs"):
        train(data, cache, tmp_path / "other", images=str(images), epochs=1.0)


def test_a_folder_that_holds_a_run_is_refused(run, data, cache):
    before = student_sha256(run)
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume, or choose another folder"):
        train(data, cache, run)
    assert student_sha256(run) == before


MISFITS = {
    "vocabulary": ["vocabulary: 512 in the cache, 520 here"],
    "template": ["template: v1 in the cache, plain here"],
    "maximum length": ["maximum length: 2048 in the cache, 100 here"],
    "temperature": ["temperature 1.0, but recipe 'align-kd' has temperature 2.0", "--set temperature=1.0", "--temperature 2.0"],
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_cache_that_does_not_fit_is_refused_with_both_values_and_the_way_out(data, cache, tmp_path, name):
    changes = {"template": {"template": "plain"}, "maximum length": {"max_length": 100}}.get(name, {})
    if name == "vocabulary":
        changes = {"student": str(with_vocabulary(STUDENT, tmp_path / "student", 520))}
    if name == "temperature":
        changes = {"overrides": {"temperature": "2.0"}}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the parts follow
        train(data, cache, tmp_path / "out", **changes)
    for part in [*MISFITS[name], "the cache"]:
        assert part in str(error.value)
    if name != "temperature":
        assert f"{cache} is incompatible with this run" in str(error.value)
        assert "or write another cache with alignkd cache-teacher" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_cache_without_the_targets_of_the_recipe_is_refused(data, tmp_path):
    write_cache(data, tmp_path / "cache", settings=TargetSettings(targets=("logits",)))
    words = "recipe 'align-kd' needs attention, vision, which the cache does not hold; choose another --recipe, or cache with"
    with pytest.raises(ValueError, match=words):
        train(data, tmp_path / "cache", tmp_path / "out")
    train(data, tmp_path / "cache", tmp_path / "out", recipe="logits-only", max_steps=1)


def test_a_recipe_with_a_teacher_and_no_cache_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="needs attention, logits, vision from a teacher: give --cache"):
        distill(stage_two_config(data, None, tmp_path / "out"))


def test_a_student_of_the_teachers_own_shape_can_be_trained(data, cache, tmp_path):
    train(data, cache, tmp_path / "out", student=str(TEACHER), max_steps=1)
