from __future__ import annotations

import itertools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from tiny_runs import (
    IMAGES,
    STUDENT,
    metrics,
    run_record,
    student_sha256,
    train,
    without_time,
    write_cache,
)

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.rows.row import EncodedField
from alignkd.cache_store.rows.spec import FieldSpec
from alignkd.capture.attention import capture, enable_capture
from alignkd.losses.recipes import get_recipe
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import module_fingerprint
from alignkd.objective import Objective, TeacherShape
from alignkd.pipeline.cache_io.logits import open_codec, settings_of
from alignkd.pipeline.cache_io.targets import collate_targets
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.stage_one.run_teacher import run_teacher
from alignkd.pipeline.training import run_inputs, teacher_source
from alignkd.targets.logits import LogitSettings

FIGURES = {"step", "epoch", "samples", "tokens", "answers", "truncated", "seconds", "loss", "grad_norm", "learning_rate"}
FIGURES |= {"tokens_per_second", "samples_per_second", "data_wait_share", "attention_contrast", "peak_memory_bytes"}
FIGURES |= {"padding", "padding_share"}


def exact(**changes):
    return TargetSettings(attention_codec="exact", vision_codec="exact", **changes)


def training_set(vlm, data, cache, needs):
    preparer = Preparer.of(vlm, template="v1", max_length=2048, image_root=IMAGES)
    return TrainingSet(SampleFile(data), preparer, student=vlm, reader=CacheReader(cache), needs=needs, max_rejected=0)


def exact_targets(values, batch):
    """The targets of a batch as they are, without a cache between."""
    stored = [
        {
            name: EncodedField(FieldSpec(name, ("A",) * value.ndim, str(value.dtype), "exact"), value.shape, {"values": value})
            for name, value in row.items()
            if name not in ("input_ids", "labels")
        }
        for row in values
    ]
    return collate_targets(stored, batch)


def codec_of(teacher, cache):
    """The codec that a cache was written with."""
    reader = CacheReader(cache)
    return open_codec(settings_of(reader.fingerprint), reader.tensors, teacher.device)


def loss_and_gradients(recipe, batch, targets, codec):
    torch.manual_seed(0)
    objective = Objective(load_vlm(STUDENT), recipe, TeacherShape(8, 64), logit_codec=codec).train()
    outputs = objective(batch, targets)
    outputs["loss"].backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in {"loss": outputs["loss"], **outputs["terms"]}.items()}, gradients


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("recipe", "settings", "bound"),
    [
        pytest.param("align-kd", TargetSettings(attention_codec="float16", vision_codec="float16"), 2e-3, marks=SLOW),
        pytest.param("paper", TargetSettings(attention_codec="float16", vision_codec="float16"), 2e-3, marks=SLOW),
        pytest.param("align-kd", exact(logits=LogitSettings("topk", top_k=512)), 5e-3, marks=SLOW),
        pytest.param("align-kd", exact(logits=LogitSettings("sampled")), 5e-3, marks=SLOW),
        pytest.param("align-kd", exact(logits=LogitSettings("hidden")), 5e-2, marks=SLOW),
        pytest.param("align-kd", exact(logits=LogitSettings("hidden", hidden_bits=16)), 2e-3, marks=SLOW),
        ("align-kd", TargetSettings(), 1e-2),
        pytest.param("align-kd", TargetSettings(attention_codec="int8-rows"), 3e-2, marks=SLOW),
        pytest.param("align-kd", TargetSettings(attention_codec="sqrt4", vision_codec="int4-blocks"), 2e-1, marks=SLOW),
    ],
)
def test_cached_targets_give_the_loss_and_gradients_of_targets_made_online(
    student_vlm, teacher_vlm, tmp_path, data, cache, recipe, settings, bound
):
    if settings != TargetSettings():
        cache = tmp_path / "cache"
        write_cache(data, cache, settings=settings)
    recipe = get_recipe(recipe)
    whole = training_set(student_vlm, data, cache, recipe.needs)
    items = [whole[i] for i in range(len(whole))]
    cached = whole.collate(items)
    enable_capture(teacher_vlm)
    inputs = [item.input for item in items]
    codec = codec_of(teacher_vlm, cache)
    output = run_teacher(teacher_vlm, cached["batch"], inputs, settings, codec, [sample.key for sample in whole.samples])
    online = exact_targets(output.values(), cached["batch"])
    terms, gradients = loss_and_gradients(recipe, cached["batch"], cached["targets"], codec)
    terms_online, gradients_online = loss_and_gradients(recipe, cached["batch"], online, codec)
    assert set(terms) == {"loss", "supervised", "reverse_kl", "attention", "vision_all", "vision_focus"}
    for name in terms:
        assert terms[name] == pytest.approx(terms_online[name], rel=bound, abs=bound * 1e-2), name
    assert gradients.keys() == gradients_online.keys()
    difference = sum(float((gradients[n] - gradients_online[n]).square().sum()) for n in gradients) ** 0.5
    size = sum(float(g.square().sum()) for g in gradients_online.values()) ** 0.5
    assert size > 0  # two gradients of nothing would agree as well
    assert difference <= bound * size


def test_the_teacher_is_never_loaded(cache, data, tmp_path, monkeypatch):
    assert not os.path.exists(run_record(cache)["configuration"]["teacher"])
    loaded = []
    for module in (run_inputs, teacher_source):
        monkeypatch.setattr(module, "load_vlm", lambda folder, **k: loaded.append(str(folder)) or load_vlm(folder, **k))
    train(data, cache, tmp_path / "out", max_steps=1)
    assert loaded == [str(STUDENT)]


def test_metrics_hold_every_term_weighted_and_unweighted_and_they_add_up(run):
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 13))
    recipe = get_recipe("align-kd")
    weights = {"supervised": 1.0, "reverse_kl": 1.0, "attention": recipe.attention, "vision_all": 1.0, "vision_focus": 0.1}
    for number, line in enumerate(lines, start=1):
        assert set(line) == FIGURES | set(weights) | {f"{kind}/{name}" for kind in ("weighted", "share") for name in weights}
        assert all(np.isfinite(value) for value in line.values())
        for name, weight in weights.items():
            assert line[name] > 0
            assert line[f"weighted/{name}"] == pytest.approx(weight * line[name], rel=1e-5)
        assert line["loss"] == pytest.approx(sum(line[f"weighted/{name}"] for name in weights), rel=1e-4)
        assert sum(line[f"share/{name}"] for name in weights) == pytest.approx(1, rel=1e-5)
        assert line["samples"] == 2 * number
        assert line["epoch"] == pytest.approx(number / 3, abs=1e-4)
    assert all(a["tokens"] < b["tokens"] and a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(lines))
    assert lines[2]["tokens"] < lines[5]["tokens"]


def test_the_loss_goes_down(run):
    lines = metrics(run)
    assert sum(line["loss"] for line in lines[-3:]) < 0.95 * sum(line["loss"] for line in lines[:3])


def test_a_run_says_how_it_was_made(run, cache):
    resolved = json.loads((run / "run.json").read_text())
    assert resolved["configuration"]["recipe"]["name"] == "align-kd"
    assert resolved["configuration"]["recipe"]["attention"] == get_recipe("align-kd").attention
    assert (resolved["configuration"]["template"], resolved["configuration"]["max_length"]) == ("v1", 2048)
    assert resolved["configuration"]["cache_fingerprint"] == CacheReader(cache).fingerprint
    assert {"torch", "transformers", "alignkd", "python"} <= set(resolved["versions"])
    assert json.loads((run / "result.json").read_text())["steps"] == 12


def test_the_tower_stays_bit_identical_while_projector_and_language_model_learn(run, student_vlm):
    trained = load_vlm(run / "student")
    assert module_fingerprint(trained.tower) == module_fingerprint(student_vlm.tower)
    for part in ("multi_modal_projector", "language_model"):
        before, after = (dict(getattr(vlm.model.model, part).named_parameters()) for vlm in (student_vlm, trained))
        assert before.keys() == after.keys()
        assert all(not torch.equal(before[name], after[name]) for name in before), part
    assert not torch.equal(student_vlm.model.lm_head.weight, trained.model.lm_head.weight)


def test_the_student_loads_again_from_both_layouts_with_identical_outputs(run, student_vlm, data, cache):
    whole = training_set(student_vlm, data, cache, frozenset())
    batch = whole.collate([whole[i] for i in range(6)])["batch"]
    captured = []
    for folder in ("student", "student-official"):
        vlm = load_vlm(run / folder)
        assert vlm.tokenizer_fingerprint() == student_vlm.tokenizer_fingerprint()
        assert vlm.images.fingerprint() == student_vlm.images.fingerprint()
        with torch.no_grad():
            captured.append(capture(vlm, batch))
    assert torch.equal(captured[0].hidden_AD, captured[1].hidden_AD)
    assert torch.equal(captured[0].attention[0], captured[1].attention[0])
    assert torch.equal(captured[0].vision_BVD, captured[1].vision_BVD)


@pytest.mark.slow
def test_the_official_folder_can_be_moved_and_trained_on_again(run, tmp_path, data, cache):
    shutil.copytree(run / "student-official", tmp_path / "moved")
    train(data, cache, tmp_path / "out", student=str(tmp_path / "moved"), max_steps=1)


def test_two_runs_of_one_seed_are_bit_identical_and_of_two_seeds_are_not(run, data, cache, tmp_path):
    train(data, cache, tmp_path / "same")
    train(data, cache, tmp_path / "other", seed=1)
    assert student_sha256(tmp_path / "same") == student_sha256(run)
    assert student_sha256(tmp_path / "other") != student_sha256(run)


@pytest.mark.slow
def test_gradient_accumulation_takes_as_many_samples_a_step_as_one_large_batch(data, cache, tmp_path):
    train(data, cache, tmp_path / "out", batch_size=1, gradient_accumulation=4, epochs=2.0)
    lines = metrics(tmp_path / "out")
    assert [line["samples"] for line in lines] == [4, 6, 10, 12]
    for line in lines:
        assert line["loss"] == pytest.approx(sum(v for k, v in line.items() if k.startswith("weighted/")), rel=1e-4)


@pytest.mark.slow
def test_tower_features_kept_in_memory_give_the_same_metrics(run, data, cache, tmp_path):
    train(data, cache, tmp_path / "out", cache_tower_features=True, max_steps=4, epochs=4.0)
    train(data, cache, tmp_path / "plain", max_steps=4, epochs=4.0)
    for ours, theirs in zip(without_time(metrics(tmp_path / "out")), without_time(metrics(tmp_path / "plain")), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_metrics(run, data, cache, tmp_path):
    train(data, cache, tmp_path / "out", gradient_checkpointing=True)
    for ours, theirs in zip(without_time(metrics(tmp_path / "out")), without_time(metrics(run)), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
def test_the_projector_may_have_its_own_learning_rate(data, cache, tmp_path, student_vlm):
    train(data, cache, tmp_path / "out", projector_learning_rate=0.0, max_steps=3)
    trained = load_vlm(tmp_path / "out" / "student")
    projector = [module_fingerprint(vlm.model.model.multi_modal_projector) for vlm in (student_vlm, trained)]
    assert projector[0] == projector[1]
    assert student_vlm.weights_fingerprint() != trained.weights_fingerprint()


@pytest.mark.slow
def test_fine_tuning_needs_no_cache(data, tmp_path):
    train(data, None, tmp_path / "out", recipe="sft", max_steps=2)
    line = metrics(tmp_path / "out")[-1]
    assert line["loss"] == pytest.approx(line["supervised"], rel=1e-5)
    assert not {"reverse_kl", "attention", "vision_all"} & set(line)


@pytest.mark.parametrize("recipe", ["paper", "logits-only"])
def test_every_recipe_trains(data, cache, tmp_path, recipe):
    train(data, cache, tmp_path / "out", recipe=recipe, max_steps=1)
    assert ("attention" in metrics(tmp_path / "out")[0]) == (recipe == "paper")
