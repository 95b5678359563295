"""``--alignment slice``: a cache without attention and vision tokens trains the same student as one with them."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from test_pipeline_distill_resume import sigterm_at
from tiny_runs import (
    IMAGES,
    SAMPLES,
    STUDENT,
    TEACHER,
    content,
    copy_checkpoint,
    metrics,
    stage_one_config,
    student_sha256,
    train,
    without_time,
    write_cache,
)

from alignkd.cache_store.errors import FingerprintMismatchError
from alignkd.cache_store.protocol.maintenance.convert import convert
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import open_store
from alignkd.capture.attention import capture
from alignkd.pipeline.cache_io import teacher_slice as slice_io
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.runtime.signals import Interrupted
from alignkd.pipeline.stage_one import run_teacher as run_teacher_module
from alignkd.pipeline.stage_one.dry_run import dry_run

EXACT = TargetSettings(attention_codec="exact", vision_codec="exact")
THREE = {"max_steps": 3, "epochs": 4.0}
GROUPS = {"slice.tower", "slice.projector", "slice.text"}


@pytest.fixture(scope="module")
def sliced(tmp_path_factory, data):
    """A slice with its tower; the teacher that wrote it is gone."""
    folder = tmp_path_factory.mktemp("sliced")
    teacher = copy_checkpoint(TEACHER, folder / "teacher")
    write_cache(data, folder / "cache", teacher=str(teacher), alignment="slice", settings=EXACT)
    shutil.rmtree(teacher)
    return folder / "cache"


@pytest.fixture(scope="module")
def towerless(tmp_path_factory, data):
    cache = tmp_path_factory.mktemp("towerless") / "cache"
    write_cache(data, cache, alignment="slice", slice_without_tower=True, settings=EXACT)
    return cache


@pytest.fixture(scope="module")
def exact(tmp_path_factory, data):
    """The same targets, kept for every sample without loss."""
    cache = tmp_path_factory.mktemp("exact") / "cache"
    write_cache(data, cache, settings=EXACT)
    return cache


@pytest.fixture(scope="module")
def expected(tmp_path_factory, data, exact):
    """Metrics of three steps from the cache of exact targets."""
    out = tmp_path_factory.mktemp("expected") / "out"
    train(data, exact, out, **THREE)
    return metrics(out)


@pytest.fixture(scope="module")
def other_tower(tmp_path_factory):
    """The student with one number of its tower changed."""
    folder = copy_checkpoint(STUDENT, tmp_path_factory.mktemp("student") / "other")
    changed = 0
    for path in folder.rglob("pytorch_model.bin"):
        state = torch.load(path, weights_only=True)
        for name in [n for n in state if n.endswith("embeddings.class_embedding")]:
            state[name][0] += 0.5
            changed += 1
        torch.save(state, path)
    assert changed
    return folder


def assert_same_metrics(ours, theirs, rel=1e-4):
    for one, other in zip(without_time(ours), without_time(theirs), strict=True):
        assert one == pytest.approx(other, rel=rel, abs=1e-6)


def test_rows_hold_no_attention_and_no_vision_tokens_and_the_cache_holds_the_slice_once(sliced, exact):
    reader, whole = CacheReader(sliced), CacheReader(exact)
    only_whole = {f.name for f in whole.spec.fields} - {f.name for f in reader.spec.fields}
    assert only_whole == {"attention", "vision_tokens", "spans", "regions"}
    assert {name for name in reader.tensors if name.startswith("slice.")} == GROUPS
    assert not any(name.startswith("slice.") for name in whole.tensors)
    assert list(reader) == list(whole)
    for key in reader:
        row, other = reader.row(key).values, whole.row(key).values
        assert all(np.array_equal(values, other[name]) for name, values in row.items())
    with_slice, with_targets = open_store(sliced).status(), open_store(exact).status()
    assert with_slice.total_bytes - with_slice.tensor_bytes < with_targets.total_bytes / 20
    assert content(sliced) != content(exact)


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["sliced", "towerless"])
@pytest.mark.parametrize("features", [False, True], ids=["pixels", "features in memory"])
def test_a_slice_trains_loss_by_loss_as_exact_targets_do(data, expected, tmp_path, request, kept, features):
    train(data, request.getfixturevalue(kept), tmp_path / "out", cache_tower_features=features, **THREE)
    assert {"attention", "vision_all", "vision_focus", "reverse_kl"} <= metrics(tmp_path / "out")[0].keys()
    assert_same_metrics(metrics(tmp_path / "out"), expected)


@pytest.mark.slow
def test_the_command_line_goes_from_a_slice_to_the_same_student(door, data, tmp_path, expected):
    common = ["--data", data, "--images", IMAGES, "--device", "cpu", "--cache", tmp_path / "cache"]
    made = door("cache-teacher", "--teacher", TEACHER, "--alignment", "slice", "--shard-samples", 2, *common, "--json")
    assert made.code == 0, made.stderr
    tensor_bytes = sum(path.stat().st_size for path in (tmp_path / "cache" / "tensors").iterdir())
    assert json.loads(made.stdout)["tensor_bytes"] == tensor_bytes > 0
    assert json.loads(door("cache", "status", tmp_path / "cache", "--json").stdout)["tensor_bytes"] == tensor_bytes
    verified = door("cache", "verify", tmp_path / "cache")
    assert verified.code == 0, verified.stdout
    trained = door(
        *["distill", "--student", STUDENT, "--out", tmp_path / "out", *common, "--batch-size", 2, "--epochs", 4],
        *["--max-steps", 3, "--learning-rate", "1e-3", "--log-steps", 1],
    )
    assert trained.code == 0, trained.stderr
    assert_same_metrics(metrics(tmp_path / "out"), expected)


@pytest.mark.slow
def test_a_student_with_another_tower_learns_from_the_teachers_own(data, sliced, exact, other_tower, tmp_path):
    for name, cache in (("sliced", sliced), ("exact", exact)):
        train(data, cache, tmp_path / name, student=str(other_tower), **THREE)
    assert_same_metrics(metrics(tmp_path / "sliced"), metrics(tmp_path / "exact"))


def test_a_student_with_another_tower_is_refused_where_the_cache_has_none(data, towerless, other_tower, tmp_path):
    with pytest.raises(ValueError, match=r"without its vision tower [0-9a-f]{12}, and the student's tower is another: .*again"):
        train(data, towerless, tmp_path / "out", student=str(other_tower))


def test_features_of_another_tower_do_not_serve_the_teacher(data, sliced, other_tower, tmp_path):
    with pytest.raises(ValueError, match=r"--cache-tower-features keeps .* leave it out"):
        train(data, sliced, tmp_path / "out", student=str(other_tower), cache_tower_features=True)


def test_equal_weights_read_at_another_layer_are_another_tower(data, towerless, tmp_path):
    student = copy_checkpoint(STUDENT, tmp_path / "student", mm_vision_select_layer=-1)
    with pytest.raises(ValueError, match="the student's tower is another"):
        train(data, towerless, tmp_path / "out", student=str(student))


@pytest.mark.slow
def test_a_tower_that_is_shared_is_not_read(data, sliced, expected, tmp_path, other_tower):
    cache = shutil.copytree(sliced, tmp_path / "cache")
    (tower,) = (cache / "tensors").glob("slice.tower-*")
    tower.unlink()
    train(data, cache, tmp_path / "out", **THREE)
    assert_same_metrics(metrics(tmp_path / "out"), expected)
    with pytest.raises(ValueError, match=r"slice\.tower.* cannot be used"):
        train(data, cache, tmp_path / "other", student=str(other_tower))


@pytest.mark.slow
def test_a_slice_in_16_bits_keeps_16_bits_and_finds_the_tower_of_a_float32_student(data, tmp_path, student_vlm):
    settings = {"dtype": "bfloat16", "settings": EXACT}
    write_cache(data, tmp_path / "sliced", alignment="slice", slice_without_tower=True, **settings)
    write_cache(data, tmp_path / "exact", **settings)
    reader = CacheReader(tmp_path / "sliced")
    assert {reader.tensors[name].dtype.name for name in reader.tensors if name.startswith("slice.")} == {"uint16"}
    part = slice_io.open_slice(reader, student_vlm, frozenset({"attention"}), features_only=False)
    assert part.shares_tower
    assert {p.dtype for p in part.model.parameters()} == {torch.bfloat16}
    for name in ("sliced", "exact"):
        train(data, tmp_path / name, tmp_path / f"out-{name}", **THREE)
    assert_same_metrics(metrics(tmp_path / "out-sliced"), metrics(tmp_path / "out-exact"), rel=1e-2)


@pytest.mark.slow
def test_a_head_mean_is_honoured(data, tmp_path):
    settings = TargetSettings(attention="mean", attention_codec="exact", vision_codec="exact")
    for name in ("targets", "slice"):
        write_cache(data, tmp_path / name, alignment=name, settings=settings)
        train(data, tmp_path / name, tmp_path / f"out-{name}", overrides={"head_map": "mean"}, **THREE)
    assert_same_metrics(metrics(tmp_path / "out-slice"), metrics(tmp_path / "out-targets"))
    with pytest.raises(ValueError, match="the cache holds their mean"):
        train(data, tmp_path / "slice", tmp_path / "out", **THREE)


@pytest.mark.slow
def test_stage_one_captures_no_attention_and_runs_no_teacher_where_no_logits_are_wanted(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run_teacher_module, "capture", lambda *a, **k: asked.append(k["attention"]) or capture(*a, **k))
    write_cache(data, tmp_path / "logits", alignment="slice")
    assert asked
    assert not any(asked)
    asked.clear()
    write_cache(data, tmp_path / "none", alignment="slice", settings=TargetSettings(targets=("attention", "vision")))
    assert asked == []
    overrides = {"reverse_kl": "0"}
    train(data, tmp_path / "none", tmp_path / "out", overrides=overrides, **THREE)
    train(data, tmp_path / "logits", tmp_path / "other", overrides=overrides, **THREE)
    assert_same_metrics(metrics(tmp_path / "out"), metrics(tmp_path / "other"))


@pytest.mark.parametrize("recipe", ["sft", "logits-only"])
def test_a_recipe_without_alignment_terms_reads_no_slice(data, sliced, tmp_path, recipe):
    cache = shutil.copytree(sliced, tmp_path / "cache")
    for file in (cache / "tensors").glob("slice.*"):
        file.unlink()
    train(data, cache, tmp_path / "out", recipe=recipe, **THREE)
    assert "attention" not in metrics(tmp_path / "out")[0]


# --- going on, and refusing to ------------------------------------------------------------------------------------------


def test_stage_one_goes_on_with_the_slice_that_is_there(data, sliced, tmp_path, monkeypatch):
    options = {"alignment": "slice", "settings": EXACT}
    assert not write_cache(data, tmp_path / "cache", rank=0, world_size=2, **options)["complete"]
    before = sorted((tmp_path / "cache" / "tensors").iterdir())
    monkeypatch.setattr(slice_io, "slice_tensors", lambda *a, **k: pytest.fail("the slice was made again"))
    assert write_cache(data, tmp_path / "cache", **options)["complete"]
    assert sorted((tmp_path / "cache" / "tensors").iterdir()) == before
    assert content(tmp_path / "cache") == content(sliced)


def test_a_cache_of_targets_and_one_with_a_slice_do_not_go_on_as_each_other(data, sliced, exact, towerless):
    with pytest.raises(FingerprintMismatchError, match=r'fingerprint\.alignment: cache has "slice", wanted "targets"'):
        write_cache(data, sliced, settings=EXACT)
    with pytest.raises(FingerprintMismatchError, match=r'fingerprint\.alignment: cache has "targets", wanted "slice"'):
        write_cache(data, exact, settings=EXACT, alignment="slice")
    with pytest.raises(FingerprintMismatchError, match=r"fingerprint\.slice\.tower\.in_cache: cache has false, wanted true"):
        write_cache(data, towerless, settings=EXACT, alignment="slice")


@pytest.mark.slow
def test_stage_two_resumes_to_bit_identical_weights_and_its_checkpoints_hold_no_slice(data, sliced, tmp_path, monkeypatch):
    train(data, sliced, tmp_path / "whole", max_steps=4)
    with monkeypatch.context() as patch:
        sigterm_at(2, patch)
        with pytest.raises(Interrupted):
            train(data, sliced, tmp_path / "out", max_steps=4)
    train(data, sliced, tmp_path / "out", max_steps=4, resume=True)
    assert student_sha256(tmp_path / "out") == student_sha256(tmp_path / "whole")
    for checkpoint in (tmp_path / "out" / "checkpoints").glob("checkpoint-*/model.safetensors"):
        assert b"teacher_slice" not in checkpoint.read_bytes()[:100_000]


@pytest.mark.slow
def test_a_converted_cache_trains_the_same_student(data, sliced, tmp_path):
    convert(str(sliced), str(tmp_path / "tar"), "webdataset")
    for name, cache in (("zarr", sliced), ("tar", tmp_path / "tar")):
        train(data, cache, tmp_path / name, **THREE)
    assert student_sha256(tmp_path / "zarr") == student_sha256(tmp_path / "tar")


def test_a_flipped_bit_in_the_slice_is_refused(data, sliced, tmp_path):
    cache = shutil.copytree(sliced, tmp_path / "cache")
    (path,) = (cache / "tensors").glob("slice.text-*")
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.chmod(0o644)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"slice\.text.* cannot be used: .*sha256"):
        train(data, cache, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda about: about["text"].update(vocab_size=100),
            r"has vocabulary, .* \(100, 8, 64, 144\), its teacher \(512, 8, 64, 144\)",
        ),
        (lambda about: about["features"].update(projector_grid=200), r"40000\), its teacher"),
        (lambda about: about["tower"].pop("sha256"), "does not describe its slice: KeyError"),
        (lambda about: about.update(vision=3), "not the configuration of a teacher's slice"),
        (lambda about: about["text"].update(head_dim=4), r"the slice's text holds \(\d+,\) numbers"),
    ],
    ids=["vocabulary", "grid", "no digest", "no tower", "other sizes"],
)
def test_a_slice_that_is_not_of_its_teacher_is_refused(sliced, student_vlm, change, words):
    reader = CacheReader(sliced)
    fingerprint = reader.fingerprint
    change(fingerprint["slice"])
    reader.spec = dataclasses.replace(reader.spec, fingerprint=fingerprint)
    with pytest.raises(ValueError, match=words):
        slice_io.open_slice(reader, student_vlm, frozenset({"vision"}), features_only=False)


def test_a_slice_of_another_dtype_than_its_teacher_is_refused(sliced, student_vlm):
    reader = CacheReader(sliced)
    teacher = {**reader.fingerprint["teacher"], "dtype": "bfloat16"}
    reader.spec = dataclasses.replace(reader.spec, fingerprint={**reader.fingerprint, "teacher": teacher})
    with pytest.raises(ValueError, match=r"holds torch\.float32, but its teacher ran in torch\.bfloat16"):
        slice_io.open_slice(reader, student_vlm, frozenset({"vision"}), features_only=False)


def test_a_teacher_with_numbers_that_are_not_finite_starts_no_cache(data, tmp_path):
    teacher = copy_checkpoint(TEACHER, tmp_path / "teacher")
    state = torch.load(teacher / "pytorch_model.bin", weights_only=True)
    state["model.layers.0.self_attn.k_proj.weight"][0, 0] = float("inf")
    torch.save(state, teacher / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"self_attn\.k_proj\.weight holds NaN or infinite"):
        write_cache(data, tmp_path / "cache", teacher=str(teacher), alignment="slice")
    assert not (tmp_path / "cache" / "cache.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alignment": "slice", "settings": TargetSettings(targets=("logits",))}, "--targets logits has neither"),
        ({"slice_without_tower": True}, "--slice-without-tower needs --alignment slice"),
        ({"alignment": "part"}, "--alignment is 'part': expected one of targets, slice"),
    ],
)
def test_options_that_contradict_each_other_are_refused(data, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        write_cache(data, tmp_path / "cache", **options)


def test_inspecting_a_row_says_that_attention_is_recomputed(door, sliced):
    words = door("cache", "inspect", sliced, "--id", SAMPLES[0]["id"]).stdout
    assert "stage two recomputes attention and vision tokens from the teacher's slice" in words
    refused = door("cache", "inspect", sliced, "--id", SAMPLES[0]["id"], "--plot", sliced.parent / "row.png")
    assert refused.code == 2
    assert "holds no attention to draw: stage two recomputes" in refused.stderr


def test_a_dry_run_with_a_slice_estimates_its_rows(data, tmp_path):
    figures = dry_run(stage_one_config(data, tmp_path / "cache", alignment="slice"))
    real = write_cache(data, tmp_path / "cache", alignment="slice", shard_samples=6)
    assert figures["bytes_per_sample"] * 6 == pytest.approx(real["bytes"] - real["tensor_bytes"], rel=0.05)
