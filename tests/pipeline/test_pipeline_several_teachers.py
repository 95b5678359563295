"""``alignkd distill --cache A --cache B``: rows of two teachers, for different samples or for the same ones."""

from __future__ import annotations

import json
import os
import pickle
import signal
from dataclasses import replace

import pytest
import torch
from jobs import run_job
from test_pipeline_distill_resume import sigterm_at
from tiny_runs import (
    IMAGES,
    SAMPLES,
    STUDENT,
    TEACHER,
    copy_checkpoint,
    metrics,
    stage_two_config,
    student_sha256,
    wait_until,
    with_file,
    without_time,
    write_cache,
    write_data,
)

from alignkd.errors import AlignkdError, CacheError, ConfigError
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.runtime.signals import Interrupted
from alignkd.pipeline.training.checkpoints import RECORD
from alignkd.pipeline.training.distillation import open_distillation
from alignkd.pipeline.training.run import distill

EXACT = TargetSettings(attention_codec="exact", vision_codec="exact")
TERMS = ("supervised", "reverse_kl", "attention", "vision_all", "vision_focus")
FIRST, REST = SAMPLES[:3], SAMPLES[3:]


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory):
    """Of the student's shape, with other weights: another width, head count and depth than the golden teacher's."""
    folder = copy_checkpoint(STUDENT, tmp_path_factory.mktemp("other") / "teacher")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.manual_seed(1)
    noisy = {
        name: value + 0.05 * torch.randn_like(value) if value.is_floating_point() else value for name, value in state.items()
    }
    torch.save(noisy, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory, other_teacher):
    """Data of the first three samples and of the others, and caches of one teacher each: over all of it and over a part."""
    folder = tmp_path_factory.mktemp("caches")
    for name, samples in {"all": SAMPLES, "first": FIRST, "rest": REST}.items():
        write_data(folder / f"{name}.json", samples)
    for cache, data, teacher in (
        ("a-all", "all", TEACHER),
        ("a-first", "first", TEACHER),
        ("b-all", "all", other_teacher),
        ("b-rest", "rest", other_teacher),
    ):
        write_cache(folder / f"{data}.json", folder / cache, teacher=str(teacher), settings=EXACT)
    return folder


def config_of(place, caches, out, data="all", weights=(), **changes):
    given = stage_two_config(place / f"{data}.json", None, out, **changes)
    return replace(given, cache=tuple(str(place / cache) for cache in caches), cache_weight=weights)


def train(place, caches, out, **changes):
    return distill(config_of(place, caches, out, **changes))


@pytest.fixture(scope="module")
def parted(tmp_path_factory, place):
    """A run whose samples have one of two teachers each."""
    out = tmp_path_factory.mktemp("parted") / "out"
    return out, train(place, ("a-first", "b-rest"), out)


def objective_and_targets(config):
    torch.manual_seed(0)
    whole = open_distillation(config)
    whole.objective.eval()
    return whole.objective, *whole.batch(range(len(whole.data)))


def test_disjoint_caches_are_each_teacher_on_its_own_samples(place, tmp_path):
    both, batch, targets = objective_and_targets(config_of(place, ("a-first", "b-rest"), tmp_path))
    counts = targets.counts(batch)
    found = both(batch, targets)
    weights, sums = both.state_dict(), dict.fromkeys(TERMS, 0.0)
    own_names = {"a-first": "", "b-rest": "others.0."}
    for cache, before in own_names.items():
        one, part, own = objective_and_targets(config_of(place, (cache,), tmp_path, data=cache.partition("-")[2]))
        mine = {name: weights[name if name.startswith("student.") else before + name] for name in one.state_dict()}
        one.load_state_dict(mine)
        alone = one(part, own, counts)
        sums = {name: sums[name] + alone["terms"][name] for name in TERMS}
    for name in TERMS:
        torch.testing.assert_close(
            found["terms"][name], sums[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_the_average_is_the_mean_of_the_two_losses_and_weights_count(place, tmp_path):
    caches, found = ("a-all", "b-all"), {}
    for weights in ((1.0, 1.0), (3.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        objective, batch, targets = objective_and_targets(config_of(place, caches, tmp_path, weights=weights))
        found[weights] = objective(batch, targets)["loss"]
    one, other = found[1.0, 0.0], found[0.0, 1.0]
    torch.testing.assert_close(found[1.0, 1.0], (one + other) / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[3.0, 1.0], 0.75 * one + 0.25 * other, rtol=1e-5, atol=1e-6)
    assert not torch.isclose(one, other)


@pytest.mark.slow
def test_a_teacher_of_weight_zero_changes_no_bit_of_a_run(place, tmp_path):
    alone = distill(replace(config_of(place, ("a-all",), tmp_path / "one", max_steps=2)))
    both = train(place, ("a-all", "b-all"), tmp_path / "two", weights=(1.0, 0.0), max_steps=2)
    lines = zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True)
    assert all(line[name] == two[name] for line, two in lines for name in ("loss", *TERMS))
    assert "teachers" not in alone
    assert [one["samples"] for one in both["teachers"]] == [both["samples"], 0]


def test_a_teacher_of_weight_zero_teaches_what_no_other_does(place, tmp_path):
    config = config_of(place, ("a-all", "b-rest"), tmp_path, weights=(0.0, 1.0))
    teaching = open_distillation(config).data.teaching
    assert teaching.weights_KN.tolist() == [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]


def test_log_lines_and_figures_tell_the_teachers_apart(parted):
    out, figures = parted
    assert [(one["name"], one["samples"]) for one in figures["teachers"]] == [("teacher1", 12), ("teacher2", 12)]
    assert figures["samples"] == 24
    last = metrics(out)[-1]
    assert (last["samples/teacher1"], last["samples/teacher2"]) == (12, 12)
    for name in TERMS[1:]:
        assert any(f"{name}/teacher1" in line for line in metrics(out))
        assert any(f"{name}/teacher2" in line for line in metrics(out))
    assert json.loads((out / "run.json").read_text())["configuration"]["cache_weight"] == []


@pytest.mark.slow
def test_the_mean_of_a_teacher_is_over_what_it_taught(place, tmp_path):
    train(place, ("a-first", "b-rest"), tmp_path / "out", batch_size=6, max_steps=1, learning_rate=0.0)
    objective, batch, targets = objective_and_targets(config_of(place, ("a-first", "b-rest"), tmp_path))
    found, line = objective(batch, targets), metrics(tmp_path / "out")[0]
    for number, counts in enumerate(targets.taught, start=1):
        mean = float(found["of_teachers"][f"reverse_kl/teacher{number}"]) / counts.answers
        assert line[f"reverse_kl/teacher{number}"] == pytest.approx(mean, rel=1e-4)
        mean = float(found["of_teachers"][f"attention/teacher{number}"]) / counts.with_text_after_image
        assert line[f"attention/teacher{number}"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.slow
def test_a_run_of_two_teachers_resumes_to_bit_identical_weights_adapters_and_metrics(place, parted, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        sigterm_at(5, patch)
        with pytest.raises(Interrupted):
            train(place, ("a-first", "b-rest"), out)
    result = train(place, ("a-first", "b-rest"), out, resume=True)
    assert student_sha256(out) == student_sha256(parted[0])
    assert without_time(metrics(out)) == without_time(metrics(parted[0]))
    assert [one["samples"] for one in result["teachers"]] == [12, 12]
    states = [next((run / "checkpoints" / "checkpoint-12").glob("model.safetensors")) for run in (out, parted[0])]
    assert states[0].read_bytes() == states[1].read_bytes()
    assert b"others.0.head_map.logits" in states[0].read_bytes()


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_process_of_two_teachers_resumes_through_the_entry_point(place, parted, tmp_path, door):
    out = tmp_path / "out"
    arguments = ["distill", "--student", STUDENT, "--cache", place / "a-first", "--cache", place / "b-rest"]
    arguments += ["--data", place / "all.json", "--images", IMAGES, "--out", out, "--epochs", 4, "--batch-size", 2]
    arguments += ["--learning-rate", "1e-3", "--log-steps", 1, "--save-steps", 1, "--device", "cpu", "--workers", 1]
    running = door.start(*arguments)
    wait_until(lambda: list(out.glob(f"checkpoints/checkpoint-*/{RECORD}")))
    os.kill(running.pid, signal.SIGKILL)
    assert running.finish().code == -signal.SIGKILL
    resumed = door(*arguments, "--resume")
    assert resumed.code == 0, resumed.stderr
    assert student_sha256(out) == student_sha256(parted[0])
    assert "teacher2 taught 12 samples, weight 1:" in resumed.stdout


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_caches_weights_or_order(place, tmp_path):
    out = tmp_path / "out"
    train(place, ("a-first", "b-rest"), out, max_steps=1)
    for caches, weights, said in (
        (("b-rest", "a-first"), (), "cache_fingerprint"),
        (("a-all", "b-rest"), (), "data_keys"),
        (("a-first", "b-rest"), (1.0, 2.0), "cache_weight"),
        (("a-all",), (), "cache_fingerprint"),
    ):
        with pytest.raises(ConfigError, match=f"other settings.*{said}"):
            train(place, caches, out, weights=weights, max_steps=1, resume=True)


def test_a_batch_arrives_from_a_loader_process_as_it_was(place, tmp_path):
    data = open_distillation(config_of(place, ("a-first", "b-all"), tmp_path, weights=(1.0, 2.0))).data
    collated = data.collate(data.__getitems__([0, 4, 2]))
    arrived = pickle.loads(pickle.dumps(collated))["targets"]
    targets = collated["targets"]
    assert torch.equal(arrived.weights_KB, targets.weights_KB)
    assert (arrived.taught, arrived.weighted) == (targets.taught, targets.weighted)
    for mine, other in zip(targets.teachers, arrived.teachers, strict=True):
        mine, other = mine.dequantise(), other.dequantise()
        assert torch.equal(mine.vision_BVD, other.vision_BVD)
        assert torch.equal(mine.attention[0], other.attention[0])
    assert [part.teacher for part in arrived.parts] == [part.teacher for part in targets.parts]


@pytest.mark.slow
def test_lengths_of_samples_come_from_the_caches(place, tmp_path):
    one = distill(config_of(place, ("a-all",), tmp_path / "one", max_steps=1, batch_tokens=500, batch_size=None))
    two = train(place, ("a-first", "b-rest"), tmp_path / "two", max_steps=1, batch_tokens=500, batch_size=None)
    lengths = [next((tmp_path / name).glob("lengths-*.npy")) for name in ("one", "two")]
    assert lengths[0].read_bytes() == lengths[1].read_bytes()
    assert lengths[0].name != lengths[1].name
    assert one["steps"] == two["steps"]


def test_a_sample_in_no_cache_names_all_of_them(place, tmp_path):
    write_data(place / "more.json", [*SAMPLES, {**SAMPLES[0], "id": "another"}])
    with pytest.raises(CacheError, match=r"sample 'another' has no row in any of the 2 caches.*a-first.*b-rest"):
        train(place, ("a-first", "b-rest"), tmp_path / "out", data="more")


def test_each_cache_is_checked_on_its_own_and_named(place, tmp_path, other_teacher):
    write_cache(place / "rest.json", place / "logits", teacher=str(other_teacher), settings=TargetSettings(targets=("logits",)))
    with pytest.raises(CacheError, match=r"--cache .*logits: recipe 'align-kd' needs attention, vision"):
        train(place, ("a-first", "logits"), tmp_path / "out")
    changed = with_file(STUDENT, tmp_path / "other-tokenizer", "tokenizer_config.json", add_bos_token=False)
    write_cache(place / "rest.json", place / "tokens", teacher=str(changed), settings=EXACT)
    with pytest.raises(AlignkdError, match=r"the cache .*tokens.*tokenizer"):
        train(place, ("a-first", "tokens"), tmp_path / "out")


def test_a_row_that_belongs_to_other_images_names_its_cache(place, tmp_path):
    data = open_distillation(config_of(place, ("a-first", "b-rest"), tmp_path)).data
    sample = data.sample(3)
    prepared = data.preparer(sample)
    with pytest.raises(CacheError, match=r"b-rest: sample .* its image file differs"):
        data._rows(3, sample, replace(prepared, image_sha256="0" * 64))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cache": ("a", "b"), "cache_weight": (1.0,)}, "--cache-weight is given 1 times and --cache 2 times"),
        ({"cache": ("a", "b"), "cache_weight": (0.0, 0.0)}, "--cache-weight is 0 for every --cache"),
        ({"cache": ("a", "a")}, "--cache a is given twice"),
        (
            {"cache": ("a", "b"), "eval_data": "d", "eval_cache": ("c", "e", "f")},
            "--eval-cache is given 3 times and --cache 2 times",
        ),
        ({"cache": ("a", "b"), "cache_weight": (-1.0, 1.0)}, "--cache-weight is -1.0"),
        ({"cache": ("a", "b"), "online_teacher": str(TEACHER)}, "--online-teacher with several --cache"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(data, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        distill(replace(stage_two_config(data, None, tmp_path / "out"), **changes))


def test_one_cache_is_one_cache_however_it_is_given(data, cache, tmp_path):
    config = stage_two_config(data, cache, tmp_path)
    assert replace(config, cache=(str(cache),)).cache == replace(config, cache=[cache]).cache == str(cache)
    assert replace(config, cache=()).cache is None


def test_a_settings_file_names_several_caches(place, tmp_path, door):
    settings = {"cache": [str(place / "a-all"), str(place / "b-all")], "cache-weight": [1, 0.5]}
    (tmp_path / "run.yaml").write_text(json.dumps({"distill": settings}))
    arguments = ["distill", "--student", STUDENT, "--data", place / "all.json", "--images", IMAGES, "--out", tmp_path / "out"]
    arguments += ["--settings", tmp_path / "run.yaml", "--device", "cpu", "--workers", 0, "--max-steps", 1, "--json"]
    finished = door(*arguments)
    assert finished.code == 0, finished.stderr
    found = json.loads(finished.stdout)["teachers"]
    assert [(one["weight"], one["samples"]) for one in found] == [(1.0, 6), (0.5, 6)]
    assert found[1]["cache"].endswith("b-all")


@pytest.mark.parametrize("others", [pytest.param("a slice and targets", marks=pytest.mark.slow), "two slices"])
def test_slices_of_teachers_give_the_losses_of_their_targets(place, tmp_path, other_teacher, others):
    """The golden teacher shares the student's tower, and the other one does not: the student's batch serves both."""
    caches = ["a-all", "b-all"]
    expected, batch, targets = objective_and_targets(config_of(place, caches, tmp_path))
    for name, teacher in {"a": TEACHER, "b": other_teacher}.items():
        if name == "a" or others == "two slices":
            caches[name == "b"] = f"{name}-slice"
            if not (place / f"{name}-slice").exists():
                write_cache(
                    place / "all.json", place / f"{name}-slice", teacher=str(teacher), alignment="slice", settings=EXACT
                )
    sliced, same, own = objective_and_targets(config_of(place, caches, tmp_path))
    sliced.load_state_dict(expected.state_dict())
    wanted, found = expected(batch, targets), sliced(same, own)
    torch.testing.assert_close(found["loss"], wanted["loss"], rtol=1e-4, atol=1e-5)
    for name in TERMS:
        torch.testing.assert_close(found["terms"][name], wanted["terms"][name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_held_out_samples_have_the_caches_of_their_teachers(place, tmp_path):
    held_out = {"eval_data": str(place / "all.json"), "eval_steps": 1, "max_steps": 1, "learning_rate": 0.0}
    own = train(place, ("a-first", "b-rest"), tmp_path / "own", **held_out)["held_out"]
    given = config_of(place, ("a-first", "b-rest"), tmp_path / "given", **held_out)
    eval_cache = (str(place / "a-all"), str(place / "b-rest"))
    other = distill(replace(given, eval_cache=eval_cache))["held_out"]
    assert own.keys() == other.keys() >= {"loss", *TERMS, "agreement"}
    assert own["supervised"] == pytest.approx(other["supervised"], rel=1e-6)
    assert own["reverse_kl"] != other["reverse_kl"]
    objective, batch, targets = objective_and_targets(config_of(place, ("a-first", "b-rest"), tmp_path))
    assert own["reverse_kl"] == pytest.approx(float(objective(batch, targets)["terms"]["reverse_kl"]), rel=1e-4)
    with pytest.raises(CacheError, match="differs from the run's cache"):
        distill(replace(given, out=str(tmp_path / "bad"), eval_cache=(str(place / "b-rest"), str(place / "a-all"))))


ZERO2, ZERO3 = (pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3"))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("sharding", ["ddp", ZERO2, ZERO3], indirect=True)
def test_two_processes_whose_batches_lack_a_teacher_learn_what_one_learns(door, monkeypatch, place, tmp_path, sharding):
    """Batches of one sample: each process has rows of one teacher in a step, often of another one than the other process."""
    train(place, ("a-first", "b-rest"), tmp_path / "alone", epochs=1.0)
    arguments = ["distill", "--student", STUDENT, "--data", place / "all.json", "--images", IMAGES, "--out", tmp_path / "out"]
    arguments += ["--cache", place / "a-first", "--cache", place / "b-rest", "--epochs", 1, "--batch-size", 1, "--workers", 0]
    arguments += ["--device", "cpu", "--learning-rate", "1e-3", "--log-steps", 1, "--json", *sharding]
    finished = run_job(door, monkeypatch, *arguments)
    assert [one.code for one in finished] == [0, 0], finished[0].stderr
    for line, wanted in zip(metrics(tmp_path / "out"), metrics(tmp_path / "alone"), strict=True):
        own = [name for name in wanted if "/teacher" in name and "contrast" not in name]
        assert own
        for name in ("loss", *TERMS, *own):
            assert line[name] == pytest.approx(wanted[name], rel=2e-3, abs=1e-5), (line["step"], name)
