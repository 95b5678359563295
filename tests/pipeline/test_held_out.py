"""A run judged while it trains: right figures however the samples are split, training untouched, the best student kept."""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from jobs import distill_arguments, run_job
from tiny_runs import (
    GOLDEN_SAMPLES,
    IMAGES,
    SAMPLES,
    STUDENT,
    TEACHER,
    metrics,
    record,
    stage_two_config,
    student_sha256,
    train,
    without_time,
    write_cache,
    write_data,
)

from alignkd.capture.attention import capture, enable_capture
from alignkd.errors import CacheError, ConfigError, DataError
from alignkd.losses.recipes import RECIPES
from alignkd.models.loading import load_vlm
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.evaluate.benchmarks.registry import open_benchmark
from alignkd.pipeline.evaluate.running.answering import RunSettings, run_benchmark
from alignkd.pipeline.runtime.signals import Interrupted
from alignkd.pipeline.training.distillation import open_distillation
from alignkd.pipeline.training.evaluation import evaluation as evaluation_module
from alignkd.pipeline.training.evaluation.best import Best, read_best, restore
from alignkd.pipeline.training.evaluation.held_out import HeldOut
from alignkd.pipeline.training.evaluation.plan import plan_evaluation
from alignkd.targets.logit_settings import LogitSettings

BENCHMARKS = IMAGES.parents[1] / "benchmarks"
WORDS = [("hot", "A kite."), ("cold", "Two red balls, and a small one."), ("big", "Nothing."), ("far", "A cup of tea.")]
HELD_OUT = [
    *(record(f"held{word}", f"{i}.png", f"<image>\nWhat is {word}?", said) for i, (word, said) in enumerate(WORDS)),
    record("heldtext", None, "What is one and one?", "Two."),
]
TWO_OF_GQA = {"eval_benchmark": ("gqa:2",), "benchmark_root": str(BENCHMARKS)}
TERMS = ("loss", "supervised", "reverse_kl", "attention", "vision_all", "vision_focus")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("held") / "held.json", HELD_OUT)


@pytest.fixture(scope="module")
def held_cache(tmp_path_factory, held_out):
    folder = tmp_path_factory.mktemp("held") / "cache"
    write_cache(held_out, folder)
    return folder


@pytest.fixture(scope="module")
def judged(tmp_path_factory, data, cache, held_out, held_cache):
    """Twelve steps, evaluated after every fourth."""
    out = tmp_path_factory.mktemp("judged") / "out"
    given = {"eval_data": str(held_out), "eval_cache": str(held_cache), "eval_steps": 4, "keep_best": "loss"}
    return out, train(data, cache, out, **given)


def evaluations(out):
    return [line for line in metrics(out) if "eval/loss" in line or any(name.startswith("eval/") for name in line)]


def settings(held_out, held_cache, **more):
    return {"eval_data": str(held_out), "eval_cache": str(held_cache), **more}


def test_the_figures_are_those_of_all_held_out_samples_in_one_batch(judged, held_out, held_cache):
    out, figures = judged
    config = stage_two_config(held_out, held_cache, out, **{"student": str(out / "student")})
    whole = open_distillation(config)
    whole.objective.eval()
    with torch.no_grad():
        outcome = whole.objective(*whole.batch(range(len(HELD_OUT))))
    last = evaluations(out)[-1]
    assert [line["step"] for line in evaluations(out)] == [4, 8, 12]
    assert last["eval/samples"] == len(HELD_OUT)
    assert last["eval/supervised"] == pytest.approx(float(outcome["terms"]["supervised"]), rel=1e-5)
    assert last["eval/reverse_kl"] == pytest.approx(float(outcome["terms"]["reverse_kl"]), rel=1e-5)
    assert figures["held_out"]["supervised"] == pytest.approx(last["eval/supervised"])


def test_held_out_samples_may_have_any_shape_and_lie_in_several_files(tmp_path, data, cache, held_out, held_cache, judged):
    records = json.loads(held_out.read_text())
    half = len(records) // 2
    lines = "".join(json.dumps(record) + "\n" for record in records[:half])
    (tmp_path / "first.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    second = write_data(tmp_path / "second.json", records[half:])
    given = {"eval_data": (str(tmp_path / "first.jsonl.gz"), str(second)), "eval_cache": str(held_cache), "eval_steps": 4}
    train(data, cache, tmp_path / "out", **given)
    for line, wanted in zip(evaluations(tmp_path / "out"), evaluations(judged[0]), strict=True):
        assert line["eval/samples"] == wanted["eval/samples"]
        assert line["eval/supervised"] == pytest.approx(wanted["eval/supervised"], rel=1e-5)


def test_the_card_of_the_best_student_says_which_figure_chose_it(judged):
    out, figures = judged
    best = figures["best"]
    card = (out / "best" / "student" / "README.md").read_text()
    assert f"best student of its run by loss: {best['value']:.6g} at step {best['step']}." in card


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_figures_do_not_depend_on_the_batches(tmp_path, data, cache, held_out, held_cache, batch_size):
    lines = []
    for size in (2, batch_size):
        given = settings(held_out, held_cache, learning_rate=0.0, batch_size=size, max_steps=1)
        train(data, cache, tmp_path / f"out{size}", **given)
        lines.append(evaluations(tmp_path / f"out{size}")[-1])
    for name in (*TERMS, "agreement", "samples", "answers"):
        assert lines[0][f"eval/{name}"] == pytest.approx(lines[1][f"eval/{name}"], rel=1e-5), name


def test_training_is_the_same_to_the_last_bit_with_and_without_evaluations(judged, run):
    out, _ = judged
    plain = [line for line in metrics(out) if "loss" in line]
    assert without_time(plain) == without_time(metrics(run))
    assert student_sha256(out) == student_sha256(run)


def test_a_student_that_is_the_teacher_agrees_with_it_everywhere(tmp_path, data, cache, held_out, held_cache):
    given = settings(held_out, held_cache, student=str(TEACHER), learning_rate=0.0, max_steps=1)
    assert train(data, cache, tmp_path / "out", **given)["held_out"]["agreement"] == 1.0


def test_agreement_is_that_of_the_two_models_own_likeliest_tokens(tmp_path, data, cache, held_out, held_cache):
    given = settings(held_out, held_cache, learning_rate=0.0, max_steps=1)
    found = train(data, cache, tmp_path / "out", **given)["held_out"]["agreement"]
    opened = open_distillation(stage_two_config(held_out, held_cache, tmp_path / "other"))
    batch, _ = opened.batch(range(len(HELD_OUT)))
    likeliest = []
    for folder in (STUDENT, TEACHER):
        vlm = load_vlm(folder)
        enable_capture(vlm)
        with torch.no_grad():
            hidden_AD = capture(vlm, batch, attention=False, layers=[]).hidden_AD
            likeliest.append(vlm.head(hidden_AD).argmax(dim=1))
    assert found == pytest.approx(float((likeliest[0] == likeliest[1]).float().mean()))
    assert len(likeliest[0]) > 0


def test_without_rows_for_the_held_out_samples_the_supervised_loss_alone_is_measured(tmp_path, data, cache, held_out, caplog):
    with caplog.at_level("INFO"):
        figures = train(data, cache, tmp_path / "out", eval_data=str(held_out), max_steps=2)
    assert figures["held_out"].keys() == {"loss", "supervised", "samples", "answers"}
    assert figures["held_out"]["loss"] == figures["held_out"]["supervised"]
    assert "have no row" in caplog.text


@pytest.mark.slow
def test_rows_of_held_out_samples_in_the_runs_own_cache_are_found(tmp_path):
    both = write_data(tmp_path / "both.json", [*SAMPLES, *HELD_OUT])
    write_cache(both, tmp_path / "cache")
    data, held = write_data(tmp_path / "d.json", SAMPLES), write_data(tmp_path / "h.json", HELD_OUT)
    figures = train(data, tmp_path / "cache", tmp_path / "out", eval_data=str(held), max_steps=2)
    assert set(TERMS) | {"agreement"} <= figures["held_out"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sft", "paper", "logits-only"])
def test_each_recipe_measures_its_own_terms(tmp_path, data, cache, held_out, held_cache, recipe):
    figures = train(data, cache, tmp_path / "out", recipe=recipe, max_steps=2, **settings(held_out, held_cache))
    assert math.isfinite(figures["held_out"]["supervised"])
    assert ("vision_all" in figures["held_out"]) == (RECIPES[recipe].vision > 0)
    assert 0 <= figures["held_out"]["agreement"] <= 1


@pytest.mark.slow
def test_an_online_teacher_gives_the_figures_of_the_cache(tmp_path, data, cache, held_out, held_cache):
    given = {"learning_rate": 0.0, "max_steps": 1, "eval_data": str(held_out)}
    cached = train(data, cache, tmp_path / "cached", eval_cache=str(held_cache), **given)["held_out"]
    online = train(data, None, tmp_path / "online", online_teacher=str(TEACHER), **given)["held_out"]
    for name in TERMS:
        assert online[name] == pytest.approx(cached[name], rel=0.02), name
    assert online["agreement"] == cached["agreement"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_evaluations_and_the_same_best(
    tmp_path, data, cache, held_out, held_cache, judged, monkeypatch
):
    undisturbed, _ = judged
    given = settings(held_out, held_cache, eval_steps=4, keep_best="loss", save_steps=3)
    real = HeldOut.measure

    def stopped(self, *arguments):
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(1)
        return real(self, *arguments)

    calls: list[int] = []
    monkeypatch.setattr(HeldOut, "measure", stopped)
    with pytest.raises(Interrupted):
        train(data, cache, tmp_path / "out", **given)
    assert [line["step"] for line in evaluations(tmp_path / "out")] == [4]  # the second was stopped half-way
    train(data, cache, tmp_path / "out", resume=True, **given)
    found, wanted = (
        [{name: value for name, value in line.items() if name != "eval/seconds"} for line in evaluations(out)]
        for out in (tmp_path / "out", undisturbed)
    )
    assert found == wanted
    assert read_best(tmp_path / "out") == read_best(undisturbed)
    assert student_sha256(tmp_path / "out") == student_sha256(undisturbed)


@pytest.mark.slow
def test_an_evaluation_that_signals_put_off_twice_is_made_by_the_run_after(
    tmp_path, data, cache, held_out, held_cache, judged, monkeypatch
):
    undisturbed, _ = judged
    given = settings(held_out, held_cache, eval_steps=4, keep_best="loss")
    real = HeldOut.measure

    def stopped(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "measure", stopped)
        for resume in (False, True):
            with pytest.raises(Interrupted, match="at step 4"):
                train(data, cache, tmp_path / "out", resume=resume, **given)
            assert evaluations(tmp_path / "out") == []
    train(data, cache, tmp_path / "out", resume=True, **given)
    found, wanted = (
        [{k: v for k, v in line.items() if k != "eval/seconds"} for line in evaluations(out)]
        for out in (tmp_path / "out", undisturbed)
    )
    assert found == wanted
    assert student_sha256(tmp_path / "out") == student_sha256(undisturbed)


@pytest.mark.slow
def test_a_run_that_ended_early_trains_no_further_when_it_is_resumed(tmp_path, data, cache, held_out, held_cache):
    """Its last checkpoint is of the step at which it ended."""
    given = settings(held_out, held_cache, eval_steps=1, keep_best="loss", patience=2, learning_rate=0.0, save_steps=1)
    ended = train(data, cache, tmp_path / "out", **given)
    lines, student = evaluations(tmp_path / "out"), student_sha256(tmp_path / "out")
    again = train(data, cache, tmp_path / "out", resume=True, **given)
    assert ended["ended_early"]
    assert again["ended_early"]
    assert again["steps"] == ended["steps"] == 3
    assert evaluations(tmp_path / "out") == lines
    assert student_sha256(tmp_path / "out") == student


def test_the_best_student_is_the_one_of_its_step_and_loads(judged, data, cache, tmp_path, held_out, held_cache):
    out, figures = judged
    losses = {line["step"]: line["eval/loss"] for line in evaluations(out)}
    best = min(losses, key=losses.__getitem__)
    assert figures["best"]["name"] == "loss"
    assert (figures["best"]["step"], figures["best"]["value"]) == (best, pytest.approx(losses[best]))
    given = settings(held_out, held_cache, student=str(out / "best" / "student"), learning_rate=0.0, max_steps=1)
    again = train(data, cache, tmp_path / "again", **given)["held_out"]
    assert again["supervised"] == pytest.approx(
        next(x for x in evaluations(out) if x["step"] == best)["eval/supervised"], rel=1e-5
    )


def test_a_damaged_best_is_not_called_one(judged, tmp_path):
    out, _ = judged
    copy = tmp_path / "copy" / "best"
    copy.mkdir(parents=True)
    (copy / "best.json").write_text((out / "best" / "best.json").read_text())
    assert read_best(tmp_path / "copy") is None
    assert read_best(tmp_path) is None


def test_a_kill_between_the_two_renames_loses_no_best_student(judged, tmp_path):
    out, _ = judged
    copy = tmp_path / "run"
    shutil.copytree(out / "best", copy / "best.old")
    assert read_best(copy) is None
    restore(copy)
    assert read_best(copy) == read_best(out) is not None
    restore(copy)
    assert read_best(copy) == read_best(out)


def test_a_record_of_the_best_that_was_changed_is_not_believed(judged, tmp_path):
    out, _ = judged
    shutil.copytree(out / "best", tmp_path / "best")
    path = tmp_path / "best" / "best.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "value": 0.0}))
    assert read_best(tmp_path) is None


@pytest.mark.slow
def test_one_kept_token_says_nothing_of_the_teachers_likeliest(tmp_path, data, held_out, caplog):
    one = TargetSettings(logits=LogitSettings(kind="topk", top_k=1))
    write_cache(data, tmp_path / "c", settings=one)
    write_cache(held_out, tmp_path / "h", settings=one)
    figures = train(data, tmp_path / "c", tmp_path / "out", max_steps=1, **settings(held_out, tmp_path / "h"))
    assert "agreement" not in figures["held_out"]
    assert "reverse_kl" in figures["held_out"]
    assert "agreement with the teacher is not measured" in caplog.text


@pytest.mark.slow
def test_no_better_figure_for_as_long_as_patience_ends_the_run_well(tmp_path, data, cache, held_out, held_cache):
    given = settings(held_out, held_cache, eval_steps=2, keep_best="loss", patience=2, learning_rate=0.0)
    figures = train(data, cache, tmp_path / "out", **given)
    assert (figures["steps"], figures["ended_early"]) == (6, True)  # the best is the first; then two that are no better
    assert figures["best"]["step"] == 2
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()
    resumed = train(data, cache, tmp_path / "out", resume=True, **given)
    assert (resumed["steps"], resumed["ended_early"]) == (6, True)


@pytest.mark.slow
def test_the_best_of_a_lora_run_is_an_adapter_and_training_goes_on_as_without(tmp_path, data, cache, held_out, held_cache):
    given = {"lora": True, "lora_rank": 4, "max_steps": 4}
    plain = train(data, cache, tmp_path / "plain", **given)
    kept = settings(held_out, held_cache, eval_steps=2, keep_best="supervised", **given)
    judged = train(data, cache, tmp_path / "judged", **kept)
    assert judged["loss"] == plain["loss"]
    assert (tmp_path / "judged" / "best" / "adapter" / "adapter_model.safetensors").is_file()
    assert student_sha256(tmp_path / "judged") == student_sha256(tmp_path / "plain")


@pytest.mark.slow
def test_a_sampled_benchmark_has_the_score_of_the_finished_student_on_the_same_questions(tmp_path, data, cache, monkeypatch):
    asked, real = [], evaluation_module.as_answers

    def noted(benchmark, texts):
        asked.append(benchmark)
        return real(benchmark, texts)

    monkeypatch.setattr(evaluation_module, "as_answers", noted)
    given = {"eval_benchmark": ("pope:30",), "benchmark_root": str(BENCHMARKS), "eval_steps": 6, "keep_best": "pope"}
    figures = train(data, cache, tmp_path / "out", **given)
    assert [len(benchmark.questions) for benchmark in asked] == [30, 30]
    assert asked[0].questions == asked[1].questions
    score = run_benchmark(load_vlm(tmp_path / "out" / "student"), asked[1], RunSettings(template="v1")).score
    assert figures["held_out"]["benchmark/pope"] == pytest.approx(score)
    assert figures["best"]["name"] == "pope"
    assert len(open_benchmark("pope", BENCHMARKS).questions) > 30


@pytest.mark.slow
def test_held_out_samples_that_cannot_be_read_are_named_and_limited(tmp_path, data, cache, caplog):
    broken = [*HELD_OUT, record("gone", "none.png", "<image>\nWhat?", "That.")]
    held = write_data(tmp_path / "held.json", broken)
    with caplog.at_level("INFO"):
        figures = train(data, cache, tmp_path / "out", eval_data=str(held), eval_steps=1, max_steps=2)
    assert figures["held_out"]["samples"] == len(HELD_OUT)
    assert "gone" in caplog.text
    with pytest.raises(DataError, match="gone"):
        train(data, cache, tmp_path / "strict", eval_data=str(held), max_steps=1, max_rejected=0)


def test_held_out_samples_that_are_trained_on_are_warned_of(tmp_path, data, cache, caplog):
    held = write_data(tmp_path / "held.json", [GOLDEN_SAMPLES[0], *HELD_OUT])
    train(data, cache, tmp_path / "out", eval_data=str(held), max_steps=1)
    assert f"1 of {len(HELD_OUT) + 1} held-out samples are training samples, too ({GOLDEN_SAMPLES[0]['id']})" in caplog.text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"eval_steps": 2}, "--eval-steps needs something to evaluate"),
        ({"keep_best": "loss"}, "--keep-best needs something to evaluate"),
        ({"eval_cache": "c"}, "--eval-cache is about held-out samples"),
        ({"eval_benchmark": ("gqa:4",)}, "give --benchmark-root"),
        ({"eval_benchmark": ("gqa",), "benchmark_root": "."}, "expected a benchmark and a number of questions"),
        ({"eval_benchmark": ("snli:4",), "benchmark_root": str(BENCHMARKS)}, "known are gqa"),
        ({"benchmark_root": "."}, "is for --eval-benchmark"),
        ({"eval_benchmark": ("gqa:2",), "benchmark_root": str(BENCHMARKS), "patience": 2}, "say which one with --keep-best"),
        (
            {"eval_benchmark": ("gqa:2",), "benchmark_root": str(BENCHMARKS), "patience": 2, "keep_best": "gqa"},
            "give --eval-steps",
        ),
        ({"eval_images": "nowhere", "eval_data": "x"}, "--eval-images nowhere does not exist"),
        ({"eval_data": "nowhere.json"}, "--eval-data cannot be read: .*nowhere.json"),
        ({"eval_data": __file__, "eval_cache": "no-cache-here"}, "no-cache-here"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_a_model_is_loaded(tmp_path, data, given, words):
    config = replace(stage_two_config(data, tmp_path / "no-cache", tmp_path / "out"), student="no-student", **given)
    with pytest.raises((CacheError, ConfigError, DataError), match=words):
        plan_evaluation(config)


def test_a_figure_that_is_not_measured_cannot_be_the_best(tmp_path, data, cache, held_out):
    with pytest.raises(ConfigError, match="--keep-best agreement is not measured in this run; measured are loss, supervised"):
        train(data, cache, tmp_path / "out", eval_data=str(held_out), keep_best="agreement")


def test_a_cache_of_another_teacher_is_refused(tmp_path, data, cache, held_out):
    write_cache(held_out, tmp_path / "other", teacher=str(STUDENT))
    with pytest.raises(CacheError, match=r"differs from the run's cache .* in teacher"):
        train(data, cache, tmp_path / "out", **settings(held_out, tmp_path / "other"))


@pytest.mark.parametrize(
    ("rises", "values", "steps"), [(False, [3, 2, 2, None, float("nan"), 1], [1, 2, 6]), (True, [1, 0, 5], [1, 3])]
)
def test_only_a_better_finite_figure_is_the_best(rises, values, steps):
    best = Best("x", rises)
    assert [step for step, value in enumerate(values, 1) if best.add(value, step)] == steps
    other = Best("x", rises)
    other.resume(json.loads(json.dumps(best.state_dict())))
    assert other == best


@pytest.mark.slow
def test_figures_do_not_depend_on_the_number_of_processes(door, monkeypatch, tmp_path, data, cache, held_out, held_cache):
    lines = []
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        more = ["--eval-data", held_out, "--eval-cache", held_cache, "--eval-steps", 2, "--keep-best", "loss"]
        more += ["--eval-benchmark", "pope:10", "--benchmark-root", BENCHMARKS]
        arguments = distill_arguments(data, cache, out, *more, "--batch-size", 4 // processes)
        assert [one.code for one in run_job(door, monkeypatch, *arguments, processes=processes)] == [0] * processes
        lines.append(evaluations(out))
        assert read_best(out) is not None
    for alone, together in zip(*lines, strict=True):
        assert alone["step"] == together["step"]
        for name in (*TERMS, "samples", "answers", "benchmark/pope"):
            assert together[f"eval/{name}"] == pytest.approx(alone[f"eval/{name}"], rel=2e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["zero2", "zero3"], indirect=True)
def test_shared_weights_are_evaluated_and_kept_whole(door, monkeypatch, tmp_path, data, cache, held_out, held_cache, sharding):
    out = tmp_path / "out"
    more = ["--eval-data", held_out, "--eval-cache", held_cache, "--eval-steps", 2, "--keep-best", "loss", *sharding]
    finished = run_job(door, monkeypatch, *distill_arguments(data, cache, out, *more))
    assert [one.code for one in finished] == [0, 0], finished[0].stderr
    plain = tmp_path / "plain"
    train(
        data,
        cache,
        plain,
        epochs=3.0,
        batch_size=4,
        projector_learning_rate=3e-3,
        **settings(held_out, held_cache, eval_steps=2),
    )
    for found, wanted in zip(evaluations(out), evaluations(plain), strict=True):
        for name in TERMS:
            assert found[f"eval/{name}"] == pytest.approx(wanted[f"eval/{name}"], rel=1e-3), name
    assert load_vlm(out / "best" / "student").model is not None
