"""Recipes beyond the paper through real caches and runs: other layers, and every named recipe."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_pipeline_distill_resume import sigterm_at
from tiny_runs import (
    IMAGES,
    SAMPLES,
    TEACHER,
    content,
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
from alignkd.capture.attention import capture
from alignkd.cli import main
from alignkd.inputs.batch import collate
from alignkd.losses.recipes import RECIPES, get_recipe, term_weights
from alignkd.pipeline.cache_admin.row import find_row, row_arrays
from alignkd.pipeline.config.cache_layout import ALL_TARGETS
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.sample import parse_sample
from alignkd.pipeline.runtime.signals import Interrupted
from alignkd.pipeline.stage_one.dry_run import dry_run
from alignkd.pipeline.training.monitoring.health_checks import HealthChecks
from alignkd.pipeline.training.monitoring.metrics import Metrics
from alignkd.pipeline.training.optimizers import make_optimizer
from alignkd.targets.logits import LogitSettings

EXACT = TargetSettings(attention_codec="exact", vision_codec="exact", logits=LogitSettings("hidden", hidden_bits=16))


@pytest.fixture(scope="module")
def layered(tmp_path_factory, data):
    """The teacher's layers 0 and 2 of 3, which the student's two layers meet."""
    cache = tmp_path_factory.mktemp("layered") / "cache"
    write_cache(data, cache, settings=EXACT, attention_layers="all@2")
    return cache


def test_a_cache_says_which_layers_it_holds_and_its_first_is_that_of_any_cache(data, layered, tmp_path):
    write_cache(data, tmp_path / "cache", settings=EXACT)
    plain, reader = CacheReader(tmp_path / "cache"), CacheReader(layered)
    assert reader.fingerprint["targets"].pop("attention_layers") == {"held": [0, 2], "of": 3}
    assert reader.fingerprint == plain.fingerprint
    for sample in SAMPLES:
        one, more = (find_row(r, str(sample["id"])).values for r in (plain, reader))
        assert set(more) - set(one) == {"attention_2"}
        assert more["attention_2"].shape == more["attention"].shape
        assert all(np.array_equal(one[name], more[name]) for name in one)


def test_cached_layers_are_those_that_the_teacher_has(layered, teacher_vlm):
    reader = CacheReader(layered)
    preparer = Preparer.of(teacher_vlm, template="v1", max_length=2048, image_root=str(IMAGES))
    for sample in SAMPLES[:2]:
        one = preparer(parse_sample(sample, "here")).input
        batch = collate([one], tokens_per_placeholder=teacher_vlm.tokens_per_placeholder, pad_token_id=0)
        with torch.no_grad():
            expected = capture(teacher_vlm, batch, layers=(0, 2)).attention
        found = row_arrays(reader, find_row(reader, str(sample["id"])))
        np.testing.assert_allclose(found["attention_HTV"], expected[0][0], atol=1e-5)
        np.testing.assert_allclose(found["attention_2_HTV"], expected[2][0], atol=1e-5)


def test_a_cache_of_layers_converts_without_a_change(layered, tmp_path):
    convert(layered, tmp_path / "other", "webdataset")
    assert content(tmp_path / "other") == content(layered)


@pytest.mark.parametrize("layers", ["first", "0", "first@24"])
def test_the_first_layer_by_any_name_is_the_cache_as_ever(data, tmp_path, layers):
    write_cache(data, tmp_path / "cache")
    before = content(tmp_path / "cache")
    write_cache(data, tmp_path / "cache", attention_layers=layers)  # goes on with it: a changed fingerprint would be refused
    assert content(tmp_path / "cache") == before
    assert "attention_layers" not in CacheReader(tmp_path / "cache").fingerprint["targets"]


def test_a_cache_of_other_layers_is_refused_with_both(data, layered):
    with pytest.raises(FingerprintMismatchError, match=r"attention_layers.*cache has.*wanted"):
        write_cache(data, layered, settings=EXACT, attention_layers="all")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_layers": "0,3"}, "--attention-layers: layer 3 is wanted, but there are 3: 0 to 2"),
        ({"attention_layers": "deep"}, "--attention-layers: 'deep' names no layers, expected first"),
        ({"attention_layers": "last", "alignment": "slice"}, "--alignment slice gives the attention of the first layer only"),
        ({"attention_layers": "last", "settings": TargetSettings(targets=("logits",))}, "needs attention among --targets"),
    ],
)
def test_layers_that_stage_one_cannot_cache_are_refused(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_cache(data, tmp_path / "cache", **changes)


def test_the_option_reaches_stage_one_through_the_door(data, tmp_path):
    words = ["cache-teacher", "--teacher", TEACHER, "--data", data, "--images", IMAGES, "--cache", tmp_path / "c"]
    words += ["--attention-layers", "last@2", "--targets", "attention", "--device", "cpu"]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    reader = CacheReader(tmp_path / "c")
    assert reader.fingerprint["targets"]["attention_layers"] == {"held": [2], "of": 3}
    assert "attention_2" in {field.name for field in reader.spec.fields}


def test_an_estimate_of_layers_names_no_option_that_they_rule_out(data, tmp_path):
    found = json.dumps(dry_run(stage_one_config(data, tmp_path / "c", attention_layers="all")), default=str)
    assert "attention_2" in found
    assert "--alignment slice" not in found


REFUSED = {
    "a cache of the first layer": (
        "cache",
        "align-kd",
        {"attention_layers": "last"},
        ["student's layers 1 of 2", "teacher's layers 0 only", "--attention-layers last@2", "--set attention_layers=first"],
    ),
    "a layer that the cache lacks": (
        "layered",
        "compodistill",
        {"attention_layers": "7"},
        ["attention_layers of the student: layer 7 is wanted, but there are 2: 0 to 1"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_recipe_whose_layers_the_cache_lacks_is_refused_with_both_and_the_way_out(request, data, tmp_path, name):
    fixture, recipe, overrides, parts = REFUSED[name]
    with pytest.raises(ValueError, match="attention") as error:
        train(data, request.getfixturevalue(fixture), tmp_path / "out", recipe=recipe, overrides=overrides)
    for part in parts:
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_cache_without_the_first_layer_is_refused_where_the_first_is_wanted(data, tmp_path):
    write_cache(data, tmp_path / "cache", settings=EXACT, attention_layers="2")
    with pytest.raises(ValueError, match=r"needs the attention of the teacher's first layer, but the cache holds layers 2"):
        train(data, tmp_path / "cache", tmp_path / "out", recipe="align-kd")
    with pytest.raises(ValueError, match="--attention-layers last@2"):
        train(data, tmp_path / "cache", tmp_path / "out", recipe="align-kd", overrides={"attention_layers": "last"})
    train(data, tmp_path / "cache", tmp_path / "out", recipe="compodistill", overrides={"attention_layers": "1"}, max_steps=1)


def test_a_slice_is_refused_where_other_layers_are_wanted(data, tmp_path):
    write_cache(data, tmp_path / "cache", alignment="slice")
    with pytest.raises(ValueError, match="--attention-layers middle@2 and --alignment targets, as a slice gives the first"):
        train(data, tmp_path / "cache", tmp_path / "out", recipe="compodistill")


@pytest.fixture(scope="module")
def everything(tmp_path_factory, data):
    """As ``layered``, and what each token owes to the image."""
    cache = tmp_path_factory.mktemp("everything") / "cache"
    write_cache(data, cache, settings=replace(EXACT, targets=ALL_TARGETS), attention_layers="all@2")
    return cache


@pytest.mark.parametrize("name", RECIPES)
def test_every_named_recipe_trains_three_steps_from_a_cache_with_each_of_its_terms(data, everything, tmp_path, name):
    result = train(data, everything, tmp_path / "out", recipe=name, max_steps=3)
    assert result["steps"] == 3
    lines = metrics(tmp_path / "out")
    terms = {term for term, weight in term_weights(RECIPES[name]).items() if weight > 0}
    for line in lines:
        assert all(np.isfinite(line[term]) for term in terms)
        assert {key.removeprefix("weighted/") for key in line if key.startswith("weighted/")} == terms
        precisions = {key.removeprefix("precision/") for key in line if key.startswith("precision/")}
        assert precisions == (terms if name == "beta-kd" else set())
    assert (tmp_path / "out" / "student" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        {"attention_layers": "all", "attention_distance": "kl", "attention_rows": "answer"},
        {"attention_layers": "last", "attention_distance": "cosine", "attention_rows": "instruction"},
    ],
)
def test_cached_and_online_layers_have_the_same_losses_step_by_step(data, layered, tmp_path, overrides):
    train(data, layered, tmp_path / "cached", overrides=overrides, max_steps=3)
    train(data, layered, tmp_path / "online", overrides=overrides, max_steps=3, online_teacher=str(TEACHER))
    for cached, online in zip(metrics(tmp_path / "cached"), metrics(tmp_path / "online"), strict=True):
        for name in ("loss", "attention", "vision_focus"):
            assert cached[name] == pytest.approx(online[name], rel=1e-3)


@pytest.mark.slow
def test_a_run_with_learned_weights_resumes_to_the_same_student_and_metrics(data, layered, tmp_path, monkeypatch):
    settings = {"recipe": "beta-kd", "overrides": {"weighting_learning_rate": "0.1"}, "max_steps": 6, "weight_decay": 0.1}
    train(data, layered, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        sigterm_at(3, patch)
        with pytest.raises(Interrupted):
            train(data, layered, tmp_path / "out", **settings)
    train(data, layered, tmp_path / "out", resume=True, **settings)
    assert without_time(metrics(tmp_path / "out")) == without_time(metrics(tmp_path / "whole"))
    assert student_sha256(tmp_path / "out") == student_sha256(tmp_path / "whole")
    lines = metrics(tmp_path / "whole")
    assert lines[0]["precision/supervised"] == 1
    assert lines[-1]["precision/supervised"] != 1
    for line in lines:
        for term, weight in term_weights(RECIPES["beta-kd"]).items():
            if weight > 0:
                expected = weight * line[term] * line[f"precision/{term}"]
                assert line[f"weighted/{term}"] == pytest.approx(expected, rel=1e-5)


def test_learned_weights_have_a_rate_of_their_own_and_do_not_decay(data, layered, tmp_path, monkeypatch):
    seen = []

    def spy(*args, **kwargs):
        optimizer = make_optimizer(*args, **kwargs)
        seen.append([(len(g["params"]), g["params"][0].numel(), g["lr"], g["weight_decay"]) for g in optimizer.param_groups])
        return optimizer

    monkeypatch.setattr("alignkd.pipeline.training.optimizers.make_optimizer", spy)
    overrides = {"weighting_learning_rate": "0.02"}
    train(data, layered, tmp_path / "out", recipe="beta-kd", overrides=overrides, weight_decay=0.1, max_steps=1)
    (groups,) = seen
    assert (1, 4, 0.02, 0.0) in groups
    assert [decay for _, _, _, decay in groups] == [0.1, 0.0]


def test_metrics_weigh_terms_with_their_precisions_and_other_runs_have_none(tmp_path):
    def line(learned):
        found = Metrics(tmp_path / f"{learned}.jsonl", {"supervised": 1.0, "attention": 0.5}, learned=learned, writes=True)
        outputs = {"loss": 9.0, "supervised": 2.0, "attention": 4.0, "precision/supervised": 0.5, "precision/attention": 3.0}
        found.add({name: torch.tensor(value) for name, value in outputs.items()}, samples=1, tokens=1, answers=1)
        return found.line({}, step=1, epoch=0.1)

    weighted = line(True)
    assert (weighted["weighted/supervised"], weighted["weighted/attention"]) == (1.0, 6.0)
    assert weighted["precision/attention"] == 3.0
    plain = line(False)
    assert (plain["weighted/supervised"], plain["weighted/attention"]) == (2.0, 2.0)
    assert "precision/attention" not in plain


def test_no_weight_is_asked_to_be_changed_where_weights_are_learned():
    line = {"step": 1, "share/supervised": 0.999, "share/reverse_kl": 0.001}
    fixed, learned = (get_recipe("logits-only", {"weighting": weighting}) for weighting in ("fixed", "learned"))
    assert [len([HealthChecks(recipe, lines=1)(line)][0]) for recipe in (fixed, learned)] == [2, 0]


def test_a_run_records_the_fields_of_its_recipe(data, layered, tmp_path):
    train(data, layered, tmp_path / "out", recipe="compodistill", max_steps=1)
    found = json.loads((tmp_path / "out" / "run.json").read_text())["configuration"]["recipe"]
    assert (found["attention_distance"], found["attention_layers"], found["weighting"]) == ("cosine", "middle", "fixed")


def test_learned_weights_train_beside_low_rank_updates(data, layered, tmp_path):
    overrides = {"weighting_learning_rate": "0.1"}
    train(data, layered, tmp_path / "out", recipe="beta-kd", overrides=overrides, lora=True, lora_rank=2, max_steps=4)
    assert metrics(tmp_path / "out")[3]["precision/reverse_kl"] != 1
