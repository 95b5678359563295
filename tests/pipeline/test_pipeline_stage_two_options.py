"""Stage two's options through real runs: a teacher in the loop, LoRA, like lengths, budgets, gradients of each term."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from test_pipeline_distill_resume import sigterm_at
from tiny_runs import STUDENT, TEACHER, metrics, student_sha256, train, without_time, write_cache

from alignkd.errors import ConfigError
from alignkd.models.loading import load_vlm
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.runtime.signals import Interrupted
from alignkd.pipeline.training.monitoring.health_checks import NotFiniteError
from alignkd.targets.logits import LogitSettings

TERMS = ("loss", "supervised", "reverse_kl", "attention", "vision_all", "vision_focus")


# --- a teacher in the loop -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def online(tmp_path_factory, data, cache):
    """A run with the teacher in the loop, in the order of the cache."""
    out = tmp_path_factory.mktemp("online") / "out"
    train(data, cache, out, online_teacher=str(TEACHER))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "alignment", "bound"),
    [
        (
            TargetSettings(attention_codec="exact", vision_codec="exact", logits=LogitSettings("hidden", hidden_bits=16)),
            "targets",
            1e-3,
        ),
        (TargetSettings(logits=LogitSettings("hidden", hidden_bits=16)), "slice", 1e-3),
        (TargetSettings(), "targets", 5e-2),
    ],
    ids=["lossless", "slice", "default"],
)
def test_cached_and_online_runs_have_the_same_losses_step_by_step(data, tmp_path, online, settings, alignment, bound):
    write_cache(data, tmp_path / "cache", settings=settings, alignment=alignment)
    train(data, tmp_path / "cache", tmp_path / "out")
    for cached, wanted in zip(metrics(tmp_path / "out"), metrics(online), strict=True):
        for name in TERMS:
            assert cached[name] == pytest.approx(wanted[name], rel=bound), (cached["step"], name)


@pytest.mark.slow
def test_an_online_teacher_needs_no_cache(data, tmp_path):
    result = train(data, None, tmp_path / "out", online_teacher=str(TEACHER), template="v1", max_steps=2)
    assert result["steps"] == 2
    assert set(TERMS) <= metrics(tmp_path / "out")[0].keys()


def test_an_online_teacher_that_does_not_fit_is_refused_with_both_values(data, tmp_path, monkeypatch):
    from alignkd.models.vlm import Vlm

    real = Vlm.tokenizer_fingerprint
    monkeypatch.setattr(Vlm, "tokenizer_fingerprint", lambda self: ("f" if self.folder == TEACHER else "") + real(self))
    with pytest.raises(ValueError, match=r"tokenizer: f.* of the teacher, .* here"):
        train(data, None, tmp_path / "out", online_teacher=str(TEACHER), template="v1", max_steps=1)


# --- LoRA ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lora_trains_updates_of_the_decoder_and_the_projector_alone_and_merges_them(data, cache, tmp_path):
    train(data, cache, tmp_path / "out", lora=True, lora_rank=4, lora_alpha=8, learning_rate=1e-2)
    before = load_vlm(STUDENT).model.state_dict()
    after = load_vlm(tmp_path / "out" / "student").model.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert all("multi_modal_projector" in name or name.split(".")[-2] in projections for name in changed)
    assert {name.split(".")[-2] for name in changed if "self_attn" in name or "mlp" in name} >= set(projections)
    update = (
        after["model.language_model.layers.0.self_attn.q_proj.weight"]
        - before["model.language_model.layers.0.self_attn.q_proj.weight"]
    )
    assert torch.linalg.matrix_rank(update, rtol=1e-3) <= 4
    assert load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    lines = metrics(tmp_path / "out")  # an epoch has three steps
    assert sum(line["loss"] for line in lines[-3:]) < 0.95 * sum(line["loss"] for line in lines[:3])


@pytest.mark.slow
def test_a_lora_run_resumes_to_the_same_student(data, cache, tmp_path, monkeypatch):
    settings = {"lora": True, "lora_rank": 4, "lora_dropout": 0.1, "learning_rate": 1e-2}
    train(data, cache, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        sigterm_at(5, patch)
        with pytest.raises(Interrupted):
            train(data, cache, tmp_path / "out", **settings)
    train(data, cache, tmp_path / "out", resume=True, **settings)
    assert student_sha256(tmp_path / "out") == student_sha256(tmp_path / "whole")


# --- order -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"group_by_length": False}, marks=pytest.mark.slow),
        pytest.param({"group_by_length": False, "batch_tokens": 1200, "batch_size": None}, marks=pytest.mark.slow),
        {"batch_tokens": 1200},
    ],
    ids=["any lengths", "a budget", "a budget of like lengths"],
)
def test_batches_see_every_sample_once_an_epoch_and_resume_exactly(data, cache, tmp_path, monkeypatch, settings):
    whole = train(data, cache, tmp_path / "whole", epochs=2.0, **settings)
    assert whole["samples"] == 12
    with monkeypatch.context() as patch:
        sigterm_at(3, patch)
        with pytest.raises(Interrupted):
            train(data, cache, tmp_path / "out", epochs=2.0, **settings)
    train(data, cache, tmp_path / "out", epochs=2.0, resume=True, **settings)
    assert without_time(metrics(tmp_path / "out")) == without_time(metrics(tmp_path / "whole"))
    assert student_sha256(tmp_path / "out") == student_sha256(tmp_path / "whole")


@pytest.mark.slow
def test_the_padding_that_a_run_computes_is_in_its_lines_and_its_result(run, data, cache, tmp_path):
    result = train(data, cache, tmp_path / "out", batch_size=6, epochs=1.0)
    (line,) = metrics(tmp_path / "out")
    student, samples = load_vlm(STUDENT), SampleFile(data)
    encoder = student.encoder("v1", 2048)
    lengths = [encoder.plan(samples[i].turns, len(samples[i].images)).length for i in range(6)]
    assert line["padding"] == 6 * max(lengths) - sum(lengths) > 0
    assert line["padding_share"] == result["padding_share"] == pytest.approx(line["padding"] / line["tokens"], abs=1e-5)
    assert metrics(run)[-1]["padding_share"] < line["padding_share"]  # three micro-batches of like lengths, not one of all


@pytest.mark.slow
@pytest.mark.parametrize(("before", "option"), [(True, "--group-by-length"), (False, "--no-group-by-length")])
def test_a_resume_across_the_choice_of_grouping_is_refused_with_the_option_to_give(
    data, cache, tmp_path, monkeypatch, before, option
):
    with monkeypatch.context() as patch:
        sigterm_at(1, patch)
        with pytest.raises(Interrupted):
            train(data, cache, tmp_path / "out", group_by_length=before)
    with pytest.raises(ConfigError, match=rf"its steps would take other samples. Give {option} to continue it"):
        train(data, cache, tmp_path / "out", group_by_length=not before, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["without the setting", "with another grouping"])
def test_a_run_of_an_earlier_version_is_resumed_only_as_it_took_its_samples(data, cache, tmp_path, monkeypatch, version):
    out, grouped = tmp_path / "out", version == "with another grouping"
    with monkeypatch.context() as patch:
        sigterm_at(5, patch)
        with pytest.raises(Interrupted):
            train(data, cache, out, group_by_length=grouped)
    record = json.loads((out / "run.json").read_text())
    settings = record["configuration"]
    if grouped:
        settings["step"] = {"micro_batches": 1, "samples": 2, "positions": None}
    else:
        del settings["group_by_length"]
    (out / "run.json").write_text(json.dumps(record))
    words = "by a version of alignkd that grouped samples by length in another way" if grouped else "Give --no-group-by-length"
    with pytest.raises(ConfigError, match=words):
        train(data, cache, out, resume=True)
    if not grouped:
        train(data, cache, out, resume=True, group_by_length=False)


def test_a_budget_too_small_for_a_sample_names_it(data, cache, tmp_path):
    with pytest.raises(ValueError, match="--batch-tokens 100"):
        train(data, cache, tmp_path / "out", batch_tokens=100)


# --- what is watched ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradient_norms_of_each_term_are_logged_and_change_nothing(run, data, cache, tmp_path):
    train(data, cache, tmp_path / "out", term_gradients=True)
    for line, plain in zip(metrics(tmp_path / "out"), metrics(run), strict=True):
        norms = {
            name.removeprefix("gradient_norm/"): value for name, value in line.items() if name.startswith("gradient_norm/")
        }
        assert set(norms) == set(TERMS) - {"loss"}
        assert all(value > 0 for value in norms.values())
        assert line["grad_norm"] <= sum(norms.values()) * (1 + 1e-4)
        assert line["loss"] == plain["loss"]
    assert student_sha256(tmp_path / "out") == student_sha256(run)


def test_a_loss_that_is_no_number_stops_the_run_names_its_samples_and_leaves_no_poisoned_checkpoint(data, cache, tmp_path):
    with pytest.raises(NotFiniteError, match=r"step \d+: a loss term is not a finite number for \d of 2 samples: ") as error:
        train(data, cache, tmp_path / "out", learning_rate=1e30, save_steps=1, warmup=0.0)
    ids = {sample["id"] for sample in json.loads(data.read_text())}
    assert set(error.value.sample_ids) <= {str(i) for i in ids}
    for checkpoint in (tmp_path / "out" / "checkpoints").glob("checkpoint-*"):
        assert int(checkpoint.name.rpartition("-")[2]) < error.value.step
    assert not (tmp_path / "out" / "student").exists()


def test_log_lines_also_go_to_tensorboard(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    values = {event.step: event.value for event in events.Scalars("weighted/attention")}
    assert values == pytest.approx({line["step"]: line["weighted/attention"] for line in metrics(run)})
