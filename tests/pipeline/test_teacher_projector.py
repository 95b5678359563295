"""A student that sees through its teacher's projector: what it computes, what it refuses, and training without images."""

from __future__ import annotations

import json

import pytest
import torch
from jobs import distill_arguments, run_job
from safetensors.torch import load_file
from test_pipeline_distill_resume import sigterm_at
from tiny_runs import STUDENT, TEACHER, copy_checkpoint, metrics, student_sha256, train, without_time, write_cache

from alignkd.errors import AlignkdError
from alignkd.models.loading import load_vlm, save_vlm
from alignkd.models.tower_aside import AbsentTower
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.feeding import dataset
from alignkd.pipeline.runtime.signals import Interrupted
from alignkd.pipeline.training.run_inputs import open_data, open_inputs
from alignkd.pipeline.training.student import build_objective
from alignkd.pipeline.training.teacher_source import open_teachers
from alignkd.pipeline.training.vision_input import TOWER_FILE

SEEN = {"recipe": "align-kd", "overrides": {"projector": "teacher", "vision": "0"}}
NO_IMAGES = "no/such/folder"


@pytest.fixture(scope="module")
def exact_cache(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("exact") / "cache"
    write_cache(data, folder, settings=TargetSettings(attention_codec="exact", vision_codec="exact"))
    return folder


@pytest.fixture(scope="module")
def from_cache(tmp_path_factory, data, exact_cache):
    """A finished run of twelve steps from cached tokens, the images nowhere."""
    out = tmp_path_factory.mktemp("seen") / "out"
    train(data, exact_cache, out, images=NO_IMAGES, **SEEN)
    return out


def parts_of(folder):
    vlm = load_vlm(folder)
    return vlm, vlm.teacher_projector


def test_vision_tokens_are_the_linear_map_of_the_teachers_own(from_cache, teacher_vlm):
    vlm, seen = parts_of(from_cache / "student")
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    size = vlm.model.config.vision_config.image_size
    pixels = torch.nn.functional.interpolate(pixels, size=(size, size))
    features = teacher_vlm.run_tower(pixels)
    expected = teacher_vlm.model.model.project(features) @ seen.map.weight.T + seen.map.bias
    torch.testing.assert_close(vlm.model.model.encode_images(pixels), expected, rtol=1e-5, atol=1e-6)


def test_the_teachers_part_never_changes_and_the_map_learns(from_cache, teacher_vlm, tmp_path, data, exact_cache):
    _, seen = parts_of(from_cache / "student")
    for name, value in teacher_vlm.projector.state_dict().items():
        assert torch.equal(seen.teacher.state_dict()[name], value), name
    train(data, exact_cache, tmp_path / "short", images=NO_IMAGES, max_steps=1, learning_rate=0.0, **SEEN)
    _, before = parts_of(tmp_path / "short" / "student")
    assert not torch.equal(before.map.weight, seen.map.weight)
    seen.requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in seen.teacher.parameters())


def test_cached_tokens_teach_what_the_tower_and_the_images_teach(from_cache, tmp_path, data, exact_cache):
    out = tmp_path / "out"
    train(data, exact_cache, out, vision_input="tower", **SEEN)
    for line, wanted in zip(metrics(from_cache), metrics(out), strict=True):
        for name in ("loss", "supervised", "reverse_kl", "attention", "grad_norm"):
            assert line[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), (line["step"], name)
    weights, wanted = (load_file(folder / "student" / "model.safetensors") for folder in (from_cache, out))
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def test_the_student_is_saved_whole_although_its_tower_was_not_in_memory(from_cache):
    weights, own = load_vlm(from_cache / "student"), load_vlm(STUDENT)
    assert not (from_cache / TOWER_FILE).exists()
    for name, value in own.tower.state_dict().items():
        assert torch.equal(weights.tower.state_dict()[name], value), name


def test_the_record_and_the_card_say_that_cached_tokens_were_the_input(from_cache):
    assert json.loads((from_cache / "run.json").read_text())["configuration"]["vision_input"] == "cache"
    assert "not read: vision tokens are the cache's" in (from_cache / "student" / "README.md").read_text()


def test_checkpoints_of_such_a_run_hold_no_tower(tmp_path, data, exact_cache, monkeypatch):
    sigterm_at(2, monkeypatch)
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        train(data, exact_cache, out, images=NO_IMAGES, **SEEN)
    (checkpoint,) = (out / "checkpoints").glob("*-2")
    names = [name for file in checkpoint.glob("*.safetensors") for name in load_file(file)]
    assert names
    assert not any("vision_tower" in name for name in names)


def test_a_stopped_run_resumes_to_bit_identical_weights(from_cache, tmp_path, data, exact_cache, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        sigterm_at(5, patch)
        with pytest.raises(Interrupted):
            train(data, exact_cache, out, images=NO_IMAGES, **SEEN)
    with pytest.raises(AlignkdError, match="vision_input: 'cache' before, 'tower' now"):
        train(data, exact_cache, out, vision_input="tower", resume=True, **SEEN)
    train(data, exact_cache, out, images=NO_IMAGES, resume=True, **SEEN)
    assert student_sha256(out) == student_sha256(from_cache)
    assert without_time(metrics(out)) == without_time(metrics(from_cache))


def test_the_tower_is_not_in_the_training_module(tmp_path, data, exact_cache, monkeypatch):
    from alignkd.pipeline.training import run

    real, towers = run._train, []

    def spied(config, objective, *rest):
        towers.append(objective.vlm.tower)
        return real(config, objective, *rest)

    monkeypatch.setattr(run, "_train", spied)
    train(data, exact_cache, tmp_path / "out", images=NO_IMAGES, max_steps=1, **SEEN)
    assert isinstance(towers[0], AbsentTower)
    assert not list(towers[0].parameters())


def test_a_row_of_another_sample_is_refused_without_images_too(tmp_path, data, exact_cache):
    records = json.loads(data.read_text())
    records[0]["conversations"][1]["value"] += " Indeed."
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(records))
    with pytest.raises(AlignkdError, match="has no row in the cache"):
        train(changed, exact_cache, tmp_path / "out", images=NO_IMAGES, **SEEN)


def test_a_student_with_another_tower_is_refused_by_name(tmp_path, data, exact_cache):
    student = copy_checkpoint(STUDENT, tmp_path / "student")
    state = torch.load(student / "pytorch_model.bin", weights_only=True)
    name = next(name for name in state if "vision_tower" in name and name.endswith("k_proj.weight"))
    state[name] = state[name] + 1
    torch.save(state, student / "pytorch_model.bin")
    with pytest.raises(AlignkdError, match=r"vision tower is not that of the teacher .* or projector own"):
        train(data, exact_cache, tmp_path / "out", student=str(student), **SEEN)


def test_a_cache_without_the_projector_is_refused_by_name(tmp_path, data):
    write_cache(data, tmp_path / "cache", settings=TargetSettings(targets=("attention", "logits")))
    with pytest.raises(AlignkdError, match=r"holds no projector of its teacher.*include vision"):
        train(data, tmp_path / "cache", tmp_path / "out", **SEEN)


def test_a_slice_gives_the_same_projector(tmp_path, data, exact_cache):
    write_cache(data, tmp_path / "slice", alignment="slice")
    runs = []
    for name, cache in (("slice", tmp_path / "slice"), ("rows", exact_cache)):
        out = tmp_path / name / "out"
        train(data, cache, out, recipe="teacher-projector", vision_input="tower", max_steps=3)
        runs.append(student_sha256(out))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "align-kd", "overrides": {}}, "recipe with projector teacher"),
        ({"online_teacher": str(TEACHER)}, "leave --online-teacher out"),
        ({"eval_data": "DATA"}, "give --eval-cache"),
    ],
)
def test_cached_tokens_that_cannot_be_had_are_refused_by_name(tmp_path, data, exact_cache, changes, message):
    changes = {name: str(data) if value == "DATA" else value for name, value in changes.items()}
    with pytest.raises(AlignkdError, match=message):
        train(data, exact_cache, tmp_path / "out", **{**SEEN, "vision_input": "cache", **changes})


def test_held_out_samples_are_judged_from_their_cached_tokens(tmp_path, data, exact_cache):
    figures = [
        train(data, exact_cache, tmp_path / name, eval_data=str(data), eval_cache=str(exact_cache), vision_input=name, **SEEN)
        for name in ("cache", "tower")
    ]
    first, second = (figure["evaluation"] if "evaluation" in figure else figure["held_out"] for figure in figures)
    flat = [{k: v for k, v in one.items() if isinstance(v, float) and "second" not in k} for one in (first, second)]
    assert flat[0].keys() == flat[1].keys()
    assert flat[0] == pytest.approx(flat[1], rel=1e-4, abs=1e-5)


def test_a_distilled_student_goes_on_with_its_map_and_has_no_official_layout(from_cache, tmp_path, data, exact_cache):
    student = str(from_cache / "student")
    assert not (from_cache / "student-official").exists()
    with pytest.raises(AlignkdError, match="has no official layout"):
        save_vlm(load_vlm(student), tmp_path / "official", official=True)
    train(data, exact_cache, tmp_path / "next", images=NO_IMAGES, student=student, max_steps=1, learning_rate=0.0, **SEEN)
    _, before = parts_of(student)
    _, after = parts_of(tmp_path / "next" / "student")
    assert torch.equal(before.map.weight, after.map.weight)
    write_cache(data, tmp_path / "as-teacher", teacher=student)
    with pytest.raises(AlignkdError, match="sees through a projector of its own teacher"):
        write_cache(data, tmp_path / "sliced", teacher=student, alignment="slice")


def test_the_projector_of_another_teacher_is_refused(from_cache, tmp_path, data):
    other = copy_checkpoint(TEACHER, tmp_path / "other")
    state = torch.load(other / "pytorch_model.bin", weights_only=True)
    name = next(name for name in state if "mm_projector" in name and name.endswith("weight"))
    state[name] = state[name] + 1
    torch.save(state, other / "pytorch_model.bin")
    write_cache(data, tmp_path / "cache", teacher=str(other))
    with pytest.raises(AlignkdError, match="sees through the projector of another teacher"):
        train(data, tmp_path / "cache", tmp_path / "out", student=str(from_cache / "student"), **SEEN)


def test_the_maps_gradient_from_cached_tokens_is_that_of_tower_and_images(data, exact_cache, tmp_path):
    from tiny_runs import stage_two_config

    from alignkd.pipeline.runtime.ranks import find_process

    config = stage_two_config(data, exact_cache, tmp_path / "out", images=NO_IMAGES, **SEEN)
    inputs = open_inputs(config, find_process())
    objective, _ = build_objective(inputs, open_teachers(inputs), processes=1)
    examples = open_data(inputs)
    collated = examples.collate([example for example in examples if isinstance(example, dataset.TrainingExample)])
    objective(collated["batch"], collated["targets"])["loss"].backward()
    found = inputs.student.teacher_projector.map.weight.grad.clone()
    objective.zero_grad()
    tower = open_inputs(stage_two_config(data, exact_cache, tmp_path / "o2", vision_input="tower", **SEEN), find_process())
    dense, _ = build_objective(tower, open_teachers(tower), processes=1)
    dense.load_state_dict(objective.state_dict())
    examples = open_data(tower)
    collated = examples.collate([example for example in examples if isinstance(example, dataset.TrainingExample)])
    dense(collated["batch"], collated["targets"])["loss"].backward()
    torch.testing.assert_close(found, tower.student.teacher_projector.map.weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [{"gradient_checkpointing": True}, {"lora": True, "lora_rank": 4}])
def test_other_ways_of_training_see_the_same_tokens(tmp_path, data, exact_cache, how):
    for name, more in (("cache", {"images": NO_IMAGES}), ("tower", {})):
        train(data, exact_cache, tmp_path / name, vision_input=name, max_steps=2, **SEEN, **how, **more)
    for line, wanted in zip(metrics(tmp_path / "cache"), metrics(tmp_path / "tower"), strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert load_vlm(tmp_path / "cache" / "student").teacher_projector is not None


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("sharding", ["ddp", "zero2", "zero3"], indirect=True)
def test_two_processes_learn_what_one_does(door, monkeypatch, tmp_path, data, exact_cache, sharding):
    settings = {"epochs": 3.0, "batch_size": 4, "projector_learning_rate": 3e-3}
    train(data, exact_cache, tmp_path / "alone", **SEEN, **settings)
    more = ["--set", "projector=teacher", "--set", "vision=0"]
    finished = run_job(door, monkeypatch, *distill_arguments(data, exact_cache, tmp_path / "out", *more, *sharding))
    assert [one.code for one in finished] == [0, 0], finished[0].stderr
    for line, wanted in zip(metrics(tmp_path / "out"), metrics(tmp_path / "alone"), strict=True):
        for name in ("loss", "supervised", "reverse_kl", "attention"):
            assert line[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-6), (line["step"], name)
    assert load_vlm(tmp_path / "out" / "student").teacher_projector is not None
