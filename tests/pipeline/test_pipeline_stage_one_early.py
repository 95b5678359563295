"""What stage one can know in its first seconds is refused then: before the teacher is loaded, and before hours of work."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple

import pytest
from tiny_runs import (
    SAMPLES,
    STUDENT,
    copy_checkpoint,
    record,
    stage_one_config,
    with_file,
    with_vocabulary,
    write_cache,
    write_data,
)

from alignkd.cache_store.errors import StorageAccessError
from alignkd.cache_store.protocol.store import open_store
from alignkd.errors import ConfigError, TransientError
from alignkd.models.loading import describe_vlm, load_vlm
from alignkd.pipeline.cache_io.teacher_fingerprint import model_fingerprint
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.data.rejected_samples import NoUsableSampleError, TooManyRejectedError
from alignkd.pipeline.runtime.ranks import Worker
from alignkd.pipeline.stage_one import teacher_stage
from alignkd.pipeline.stage_one.checks import place
from alignkd.pipeline.stage_one.dry_run import dry_run
from alignkd.pipeline.stage_one.worker import check_done
from alignkd.targets.logit_settings import LogitSettings

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def no_teacher(monkeypatch):
    """The teacher is not loaded before the refusal."""

    def load(*arguments, **options):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(teacher_stage, "load_vlm", load)


def refused(config, match):
    """By the run and by its dry run, which leave nothing behind."""
    with pytest.raises(ConfigError, match=match):
        dry_run(config)
    with pytest.raises(ConfigError, match=match):
        teacher_stage.StageOne.open(config)


@pytest.mark.usefixtures("no_teacher")
def test_a_cache_that_is_a_file_or_below_one_is_refused(tmp_path, data):
    (tmp_path / "file").write_text("mine")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(stage_one_config(data, cache), "is a file, expected a folder")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.usefixtures("no_teacher")
def test_a_folder_without_rights_is_refused(tmp_path, data, monkeypatch):
    monkeypatch.setattr(place.os, "access", lambda path, mode: False)
    refused(stage_one_config(data, tmp_path / "cache"), "cannot be written")
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("no_teacher")
def test_a_bucket_that_is_not_there_is_refused(s3_url, data):
    bucket = s3_url.replace("s3://", "s3://no-such-bucket-")
    with pytest.raises(StorageAccessError, match="no-such-bucket"):
        teacher_stage.StageOne.open(stage_one_config(data, bucket))


def test_the_place_of_a_cache_is_left_as_it_was(s3_url, tmp_path):
    place.check_writable(s3_url)
    assert place.open_storage(s3_url).names("") == []
    place.check_writable(str(tmp_path / "a" / "b"))
    assert os.listdir(tmp_path) == []


def test_a_cache_without_room_is_refused_before_a_shard_is_written(tmp_path, data, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    with pytest.raises(ConfigError, match=r"needs about .* more, but only 1 kB are free there"):
        write_cache(data, tmp_path / "cache")
    assert not (tmp_path / "cache" / "cache.json").exists()


@pytest.mark.slow
def test_a_cache_with_just_enough_room_is_written(tmp_path, data, monkeypatch):
    need = dry_run(stage_one_config(data, tmp_path / "cache"))["bytes"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 2 * need))
    assert write_cache(data, tmp_path / "cache")["complete"]


def test_an_unfinished_cache_without_room_for_the_rest_is_refused(tmp_path, data, monkeypatch, request):
    write_cache(data, tmp_path / "cache", rank=0, world_size=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    request.getfixturevalue("no_teacher")
    with pytest.raises(ConfigError, match="are free there"):
        teacher_stage.StageOne.open(stage_one_config(data, tmp_path / "cache"))


BAD = [record(f"bad{i}", "none.png", "<image>\nWhat?", "This.") for i in range(12)]


def test_a_cache_with_too_many_rejections_is_not_continued(tmp_path, request):
    data = write_data(tmp_path / "d.json", [*BAD, *SAMPLES])
    with pytest.raises(TooManyRejectedError, match=r"12 samples cannot be used, more than --max-rejected 1% \(10 of 18"):
        write_cache(data, tmp_path / "cache", shard_samples=12)
    # The shard that passed the limit is committed: each of its rejections is on record.
    assert len(open_store(tmp_path / "cache").status().rejected) == 12
    request.getfixturevalue("no_teacher")
    with pytest.raises(TooManyRejectedError, match=r"12 image missing.*alignkd cache repair .* --retry-rejected"):
        teacher_stage.StageOne.open(stage_one_config(data, tmp_path / "cache", shard_samples=12))


def test_a_cache_of_which_every_sample_is_rejected_is_a_failure_each_time(tmp_path):
    data = write_data(tmp_path / "d.json", BAD[:3])
    for _ in range(2):
        with pytest.raises(NoUsableSampleError, match="none of 3 samples can be used: 3 image missing"):
            write_cache(data, tmp_path / "cache")
    assert open_store(tmp_path / "cache").pending() == []


def test_rejections_of_all_workers_count_together(tmp_path):
    data = write_data(tmp_path / "d.json", [*BAD[:3], *SAMPLES[:4], *BAD[3:6]])
    given = {"shard_samples": 2, "max_rejected": 4}
    # Each worker alone rejects few enough.
    write_cache(data, tmp_path / "cache", rank=0, world_size=2, **given)
    with pytest.raises(TooManyRejectedError, match="cannot be used, more than --max-rejected 4"):
        write_cache(data, tmp_path / "cache", rank=1, world_size=2, **given)


@pytest.mark.usefixtures("no_teacher")
@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        ("logits-only", TargetSettings(targets=("attention", "vision")), "use --targets attention,logits,vision"),
        ("align-kd", TargetSettings(targets=("logits",)), "use --targets attention,logits,vision"),
        ("align-kd", TargetSettings(logits=LogitSettings(temperature=2.0)), "use --temperature 1.0"),
        ("best", TargetSettings(), "recipe 'best' is not known"),
    ],
)
def test_targets_that_a_recipe_lacks_are_refused(tmp_path, data, recipe, settings, words):
    refused(stage_one_config(data, tmp_path / "cache", recipe=recipe, settings=settings), words)


STUDENTS = {
    "another grid": (lambda folder: with_file(STUDENT, folder, "config.json", mm_projector_grid=6), "vision tokens an image"),
    "another vocabulary": (lambda folder: with_vocabulary(STUDENT, folder, 600), "vocabulary"),
    "another tokenizer": (
        lambda folder: with_file(STUDENT, folder, "tokenizer_config.json", pad_token="<s>"),
        "tokenizer",
    ),
}


@pytest.mark.usefixtures("no_teacher")
@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_that_would_not_fit_is_refused(tmp_path, data, name):
    make, words = STUDENTS[name]
    slice_too = "slice" if name != "another vocabulary" else "targets"
    config = stage_one_config(data, tmp_path / "cache", student=str(make(tmp_path / "student")), alignment=slice_too)
    refused(config, rf"--student .* could not be trained with recipe 'align-kd': .*{words}")


@pytest.mark.usefixtures("no_teacher")
def test_a_hint_that_names_an_option_of_stage_two_says_how_to_follow_it_here(tmp_path, data):
    student = with_file(STUDENT, tmp_path / "student", "tokenizer_config.json", pad_token="<s>")
    refused(
        stage_one_config(data, tmp_path / "cache", student=str(student)),
        "--set reverse_kl=0.*a FILE.yaml given as --recipe changes here",
    )


def test_the_golden_student_fits_the_golden_teacher(tmp_path, data):
    assert write_cache(data, tmp_path / "cache", student=str(STUDENT), recipe="align-kd")["complete"]


@pytest.mark.parametrize("own", [False, True], ids=["official", "saved by alignkd"])
def test_a_model_is_described_without_its_weights_as_it_is_with_them(tmp_path, own):
    folder = copy_checkpoint(STUDENT, tmp_path / "student")
    whole = load_vlm(folder)
    if own:
        (tmp_path / "own").mkdir()
        whole.save(tmp_path / "own")
        folder = tmp_path / "own"
    described = describe_vlm(folder)
    assert model_fingerprint(described, "v1") == model_fingerprint(whole, "v1")
    assert (described.layers, described.templates) == (whole.layers, whole.templates)
    assert all(parameter.is_meta for parameter in described.model.parameters())


def test_a_worker_that_leaves_shards_of_its_own_says_so(tmp_path, data):
    write_cache(data, tmp_path / "cache", rank=0, world_size=2)
    store = open_store(tmp_path / "cache")
    check_done(store, Worker(0, 2), steal=False)
    for worker, steal in ((Worker(1, 2), False), (Worker(0, 2), True), (Worker(), False)):
        with pytest.raises(TransientError, match="1 of 3 shards are not committed"):
            check_done(store, worker, steal=steal)
