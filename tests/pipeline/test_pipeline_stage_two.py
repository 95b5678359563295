from __future__ import annotations

import itertools
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from tiny_runs import (
    IMAGES,
    SAMPLES,
    STUDENT,
    TEACHER,
    copy_checkpoint,
    metrics,
    run_record,
    stage_two_config,
    student_sha256,
    train,
    wait_until,
    with_vocabulary,
    write_cache,
    write_data,
)

from alignkd.cache_store.reader import CacheReader
from alignkd.capture import capture, enable_capture
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import module_fingerprint
from alignkd.objective import TERMS, Objective, TeacherShape
from alignkd.pipeline import distill as distill_module
from alignkd.pipeline.distill import distill
from alignkd.pipeline.interrupt import Interrupted
from alignkd.pipeline.loader import MisalignedRow, TrainingSet
from alignkd.pipeline.order import epoch_order
from alignkd.pipeline.prepare import Preparer
from alignkd.pipeline.rejects import TooManyRejected
from alignkd.pipeline.samples import SampleFile
from alignkd.pipeline.targets_io import TargetSettings, collate_targets, run_teacher
from alignkd.pipeline.trainer import MetricsCheckpoint, RunCallback
from alignkd.recipes import get_recipe

FIGURES = {"step", "epoch", "samples", "tokens", "seconds", "loss", "grad_norm", "learning_rate", "peak_memory_bytes"}


def training_set(vlm, data, cache, needs):
    preparer = Preparer.of(vlm, template="v1", max_length=2048, image_root=IMAGES)
    return TrainingSet(SampleFile(data), preparer, student=vlm, reader=CacheReader(cache), needs=needs, max_rejected=0)


def loss_and_gradients(recipe, batch, targets):
    torch.manual_seed(0)
    objective = Objective(load_vlm(STUDENT), recipe, TeacherShape(8, 64)).train()
    outputs = objective(batch, targets)
    outputs["loss"].backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in outputs.items()}, gradients


@pytest.mark.parametrize(
    ("recipe", "settings", "bound"),
    [
        ("align-kd", TargetSettings(), 2e-3),
        ("paper", TargetSettings(), 2e-3),
        ("align-kd", TargetSettings(attention_codec="exact", vision_codec="exact", top_k=512), 5e-4),
        ("align-kd", TargetSettings(attention_codec="int8-rows", vision_codec="int8-rows"), 3e-2),
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
    enable_capture(teacher_vlm.model)
    inputs = [item.input for item in items]
    output = run_teacher(teacher_vlm, cached["batch"], inputs, settings)
    online = collate_targets(output.values(), cached["batch"])
    terms, gradients = loss_and_gradients(recipe, cached["batch"], cached["targets"])
    terms_online, gradients_online = loss_and_gradients(recipe, cached["batch"], online)
    assert set(terms) == {"loss", *TERMS}
    for name in terms:
        assert terms[name] == pytest.approx(terms_online[name], rel=bound, abs=bound * 1e-2), name
    assert gradients.keys() == gradients_online.keys()
    difference = sum(float((gradients[n] - gradients_online[n]).square().sum()) for n in gradients) ** 0.5
    assert difference <= bound * sum(float(g.square().sum()) for g in gradients_online.values()) ** 0.5
    assert difference > 0


def test_the_teacher_is_never_loaded(cache, data, tmp_path, monkeypatch):
    assert not os.path.exists(run_record(cache)["configuration"]["teacher"])
    loaded = []
    monkeypatch.setattr(distill_module, "load_vlm", lambda folder, **k: loaded.append(str(folder)) or load_vlm(folder, **k))
    train(data, cache, tmp_path / "out", max_steps=1)
    assert loaded == [str(STUDENT)]


def test_metrics_hold_every_term_weighted_and_unweighted_and_they_add_up(run):
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 13))
    recipe = get_recipe("align-kd")
    weights = {"supervised": 1.0, "reverse_kl": 1.0, "attention": recipe.attention, "vision_all": 1.0, "vision_focus": 0.1}
    for number, line in enumerate(lines, start=1):
        assert set(line) == FIGURES | set(weights) | {f"weighted/{name}" for name in weights}
        assert all(np.isfinite(value) for value in line.values())
        for name, weight in weights.items():
            assert line[name] > 0
            assert line[f"weighted/{name}"] == pytest.approx(weight * line[name])
        assert line["loss"] == pytest.approx(sum(line[f"weighted/{name}"] for name in weights), rel=1e-4)
        assert line["samples"] == 2 * number
        assert line["epoch"] == pytest.approx(number / 3, abs=1e-4)
    assert all(a["tokens"] < b["tokens"] and a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(lines))
    assert lines[2]["tokens"] < lines[5]["tokens"]


def test_the_loss_goes_down(run):
    lines = metrics(run)
    assert sum(line["loss"] for line in lines[-3:]) < 0.9 * sum(line["loss"] for line in lines[:3])


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
            captured.append(capture(vlm.model, batch))
    assert torch.equal(captured[0].hidden_AD, captured[1].hidden_AD)
    assert torch.equal(captured[0].attention_BHTV, captured[1].attention_BHTV)
    assert torch.equal(captured[0].vision_BVD, captured[1].vision_BVD)


def test_the_official_folder_can_be_moved_and_trained_on_again(run, tmp_path, data, cache):
    shutil.copytree(run / "student-official", tmp_path / "moved")
    train(data, cache, tmp_path / "out", student=str(tmp_path / "moved"), max_steps=1)


def test_two_runs_of_one_seed_are_bit_identical_and_of_two_seeds_are_not(run, data, cache, tmp_path):
    train(data, cache, tmp_path / "same")
    train(data, cache, tmp_path / "other", seed=1)
    assert student_sha256(tmp_path / "same") == student_sha256(run)
    assert student_sha256(tmp_path / "other") != student_sha256(run)


def sigterm_at(step, monkeypatch):
    real = RunCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunCallback, "on_step_end", on_step_end)


def without_time(lines):
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_bytes")} for line in lines]


@pytest.mark.parametrize("step", [5, 6])
def test_a_run_stopped_at_any_step_resumes_to_bit_identical_weights_and_metrics(run, data, cache, tmp_path, monkeypatch, step):
    """Step 5 lies within an epoch, step 6 ends one."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        sigterm_at(step, patch)
        with pytest.raises(Interrupted, match=f"stopped by SIGTERM at step {step}; go on with --resume"):
            train(data, cache, out)
    assert [line["step"] for line in metrics(out)] == list(range(1, step + 1))
    assert not (out / "student").exists()
    result = train(data, cache, out, resume=True)
    assert (result["steps"], result["samples"]) == (12, 24)
    assert student_sha256(out) == student_sha256(run)
    assert without_time(metrics(out)) == without_time(metrics(run))


def test_a_run_stopped_twice_resumes_twice(run, data, cache, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for step, resume in ((2, False), (7, True)):
        with monkeypatch.context() as patch:
            sigterm_at(step, patch)
            with pytest.raises(Interrupted):
                train(data, cache, out, resume=resume)
    train(data, cache, out, resume=True)
    assert student_sha256(out) == student_sha256(run)


def test_a_killed_process_resumes_to_bit_identical_weights(run, data, cache, tmp_path, door):
    out = tmp_path / "out"
    arguments = ["distill", "--student", STUDENT, "--cache", cache, "--data", data, "--images", IMAGES, "--out", out]
    arguments += ["--epochs", 4, "--batch-size", 2, "--learning-rate", "1e-3", "--log-steps", 1, "--save-steps", 1]
    arguments += ["--device", "cpu", "--workers", 0]
    running = door.start(*arguments)
    wait_until(lambda: list(out.glob(f"checkpoints/checkpoint-*/{MetricsCheckpoint.NAME}")))
    os.kill(running.pid, signal.SIGKILL)
    assert running.finish().code == -signal.SIGKILL
    assert 1 <= metrics(out)[-1]["step"] < 12
    resumed = door(*arguments, "--resume")
    assert resumed.code == 0, resumed.stderr
    assert student_sha256(out) == student_sha256(run)
    assert [line["step"] for line in metrics(out)] == list(range(1, 13))


def test_a_checkpoint_that_was_cut_short_is_passed_over(run, data, cache, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        sigterm_at(4, patch)
        with pytest.raises(Interrupted):
            train(data, cache, out, save_steps=2)
    (out / "checkpoints" / "checkpoint-4" / MetricsCheckpoint.NAME).unlink()
    (out / "checkpoints" / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    train(data, cache, out, save_steps=2, resume=True)
    assert student_sha256(out) == student_sha256(run)
    assert [line["step"] for line in metrics(out)] == list(range(1, 13))


def test_resume_without_a_checkpoint_begins_again(run, data, cache, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    first = (run / "metrics.jsonl").read_text().splitlines()[0]
    (out / "metrics.jsonl").write_text(first + "\n" + first[:40])
    train(data, cache, out, resume=True)
    assert student_sha256(out) == student_sha256(run)
    assert without_time(metrics(out)) == without_time(metrics(run))


def test_worker_processes_change_nothing(run, data, cache, tmp_path):
    train(data, cache, tmp_path / "out", workers=2)
    assert student_sha256(tmp_path / "out") == student_sha256(run)


def test_a_signal_to_every_process_of_a_job_still_writes_a_checkpoint(data, cache, tmp_path, door):
    """SLURM signals loader processes too: one that died of it would take the run down."""
    out = tmp_path / "out"
    arguments = ["distill", "--student", STUDENT, "--cache", cache, "--data", data, "--images", IMAGES, "--out", out]
    arguments += ["--max-steps", 30, "--batch-size", 2, "--log-steps", 1, "--device", "cpu", "--workers", 2, "--json"]
    running = door.start(*arguments)
    wait_until(lambda: (out / "metrics.jsonl").exists() and metrics(out))
    os.killpg(running.pid, signal.SIGTERM)
    stopped = running.finish()
    assert stopped.code == 75, stopped.stderr
    assert "stopped by SIGTERM at step" in stopped.stderr
    assert "go on with --resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert 1 <= metrics(out)[-1]["step"] < 30
    resumed = door(*arguments, "--resume")
    assert json.loads(resumed.stdout)["steps"] == 30
    assert [line["step"] for line in metrics(out)] == list(range(1, 31))


def test_gradient_accumulation_takes_as_many_samples_a_step_as_one_large_batch(data, cache, tmp_path):
    train(data, cache, tmp_path / "out", batch_size=1, gradient_accumulation=4, epochs=2.0)
    lines = metrics(tmp_path / "out")
    assert [line["samples"] for line in lines] == [4, 6, 10, 12]
    for line in lines:
        assert line["loss"] == pytest.approx(sum(v for k, v in line.items() if k.startswith("weighted/")), rel=1e-4)


def test_tower_features_kept_in_memory_give_the_same_metrics(run, data, cache, tmp_path):
    train(data, cache, tmp_path / "out", cache_tower_features=True, max_steps=4, epochs=4.0)
    train(data, cache, tmp_path / "plain", max_steps=4, epochs=4.0)
    for ours, theirs in zip(without_time(metrics(tmp_path / "out")), without_time(metrics(tmp_path / "plain")), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_tower_features_that_do_not_fit_into_memory_are_refused(data, cache, tmp_path):
    with pytest.raises(ValueError, match=r"--cache-tower-features needs .* GiB for 4 images.*leave it out"):
        train(data, cache, tmp_path / "out", cache_tower_features=True, feature_bytes=1000)


def test_gradient_checkpointing_gives_the_same_metrics(run, data, cache, tmp_path):
    train(data, cache, tmp_path / "out", gradient_checkpointing=True)
    for ours, theirs in zip(without_time(metrics(tmp_path / "out")), without_time(metrics(run)), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_the_projector_may_have_its_own_learning_rate(data, cache, tmp_path, student_vlm):
    train(data, cache, tmp_path / "out", projector_learning_rate=0.0, max_steps=3)
    trained = load_vlm(tmp_path / "out" / "student")
    projector = [module_fingerprint(vlm.model.model.multi_modal_projector) for vlm in (student_vlm, trained)]
    assert projector[0] == projector[1]
    assert student_vlm.weights_fingerprint() != trained.weights_fingerprint()


def test_fine_tuning_needs_no_cache(data, tmp_path):
    train(data, None, tmp_path / "out", recipe="sft", max_steps=2)
    line = metrics(tmp_path / "out")[-1]
    assert line["loss"] == pytest.approx(line["supervised"], rel=1e-5)
    assert not {"reverse_kl", "attention", "vision_all"} & set(line)


@pytest.mark.parametrize("recipe", ["paper", "logits-only"])
def test_every_recipe_trains(data, cache, tmp_path, recipe):
    train(data, cache, tmp_path / "out", recipe=recipe, max_steps=1)
    assert ("attention" in metrics(tmp_path / "out")[0]) == (recipe == "paper")


def test_a_cache_of_head_means_trains_head_means_and_refuses_heads(data, tmp_path):
    write_cache(data, tmp_path / "cache", settings=TargetSettings(attention="mean"))
    train(data, tmp_path / "cache", tmp_path / "out", max_steps=1, overrides={"head_map": "mean"})
    assert metrics(tmp_path / "out")[0]["attention"] > 0
    with pytest.raises(ValueError, match="use --set head_map=mean, or cache with --attention per-head"):
        train(data, tmp_path / "cache", tmp_path / "other")


def test_data_reordered_and_filtered_between_the_stages_trains(cache, tmp_path):
    data = write_data(tmp_path / "other.json", [SAMPLES[i] for i in (5, 1, 3, 0)])
    assert train(data, cache, tmp_path / "out", epochs=1.0)["samples"] == 4


def test_samples_come_in_the_order_of_seed_and_epoch(data, cache, tmp_path, monkeypatch):
    seen, real = [], TrainingSet.__getitem__
    monkeypatch.setattr(TrainingSet, "__getitem__", lambda self, i: seen.append(i) or real(self, i))
    train(data, cache, tmp_path / "out", epochs=3.0, seed=3)
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
    with pytest.raises(TooManyRejected, match="more than --max-rejected 2"):
        train(data, tmp_path / "cache", tmp_path / "other", epochs=1.0, max_rejected=2)


def test_an_image_that_vanished_since_stage_one_is_left_out_and_one_that_changed_ends_the_run(data, cache, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(IMAGES, images)
    (images / "1.png").unlink()
    result = train(data, cache, tmp_path / "out", images=str(images), epochs=1.0)
    assert (result["samples"], set(result["rejected_samples"])) == (5, {"vqa1"})
    shutil.copyfile(images / "0.png", images / "1.png")
    with pytest.raises(MisalignedRow, match="'vqa1' does not match its row in the cache: its image file differs"):
        train(data, cache, tmp_path / "other", images=str(images), epochs=1.0)


def test_a_folder_that_holds_a_run_is_refused(run, data, cache):
    before = student_sha256(run)
    with pytest.raises(ValueError, match="already holds a run; go on with --resume, or choose another folder"):
        train(data, cache, run)
    assert student_sha256(run) == before


MISFITS = {
    "vocabulary": ["vocabulary: 512 in the cache, 520 here"],
    "vision tokens": ["vision tokens an image: 144 in the cache, 36 here"],
    "template": ["template: v1 in the cache, plain here"],
    "maximum length": ["maximum length: 2048 in the cache, 100 here"],
    "temperature": ["temperature 1.0, the recipe wants 2.0", "--set temperature=1.0", "--temperature 2.0"],
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_cache_that_does_not_fit_is_refused_with_both_values_and_the_way_out(data, cache, tmp_path, name):
    changes = {"template": {"template": "plain"}, "maximum length": {"max_length": 100}}.get(name, {})
    if name == "vocabulary":
        changes = {"student": str(with_vocabulary(STUDENT, tmp_path / "student", 520))}
    if name == "vision tokens":
        changes = {"student": str(copy_checkpoint(STUDENT, tmp_path / "student", mm_projector_grid=6))}
    if name == "temperature":
        changes = {"overrides": {"temperature": "2.0"}}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the parts follow
        train(data, cache, tmp_path / "out", **changes)
    for part in [*MISFITS[name], "the cache"]:
        assert part in str(error.value)
    if name != "temperature":
        assert f"{cache} does not fit" in str(error.value)
        assert "or write another cache with alignkd cache-teacher" in str(error.value)
    assert not (tmp_path / "out").exists()


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
