"""The advantage of answer tokens: exact before it is stored, within the bound of a byte after, for one more pass at most."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny_runs import (
    GOLDEN_SAMPLES,
    IMAGES,
    SAMPLES,
    STUDENT,
    TEACHER,
    TEXT_ONLY,
    content,
    metrics,
    stage_one_config,
    train,
    write_cache,
    write_data,
)

from alignkd.cache_store.codecs.nats import NATS_MAX
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.capture.advantage import LARGEST
from alignkd.capture.online_teacher import OnlineTeacher
from alignkd.cli import main
from alignkd.errors import CacheError, ConfigError
from alignkd.inputs.batch import Counts
from alignkd.inputs.destroyed import destroy
from alignkd.losses.recipes import get_recipe
from alignkd.models.loading import load_vlm
from alignkd.objective import Objective, TeacherShape
from alignkd.pipeline.cache_admin.row import find_row, row_arrays, row_figures, row_pieces
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.sample import parse_sample
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.stage_one.teacher_stage import StageOne
from alignkd.targets.batch_targets import DecodedTargets, Targets

WITH_ADVANTAGE = TargetSettings(targets=("attention", "vision", "logits", "advantage"))
ALONE = TargetSettings(targets=("advantage",))


@pytest.fixture(scope="module")
def advantage_cache(tmp_path_factory, data):
    cache = tmp_path_factory.mktemp("advantage") / "cache"
    write_cache(data, cache, settings=WITH_ADVANTAGE)
    return cache


@pytest.fixture(scope="module")
def dense(teacher_vlm):
    """By sample id: the advantages from two whole passes of the model over the sample alone, without any capture."""
    preparer = Preparer.of(teacher_vlm, template=teacher_vlm.default_template, max_length=2048, image_root=IMAGES)
    encoder, found = preparer.encoder, {}

    def logprobs(turns, images):
        made, _ = encoder.encode(turns, [encoder.load(image) for image in images])
        batch = teacher_vlm.collate([made])
        inputs = {"pixel_values": batch.images} if len(made.images) else {}
        with torch.inference_mode():
            logits_1SN = teacher_vlm.model(
                input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, **inputs
            ).logits
        logprobs_SN = logits_1SN[0].double().log_softmax(1)
        return logprobs_SN[batch.answer_positions_A, batch.answer_ids_A]

    for record in SAMPLES:
        sample = parse_sample(record, "")
        images = preparer.decoded_images(sample)
        blurred = []
        for image in images:
            small = image.resize((max(1, round(image.width / 10)), max(1, round(image.height / 10))), Image.BILINEAR)
            blurred.append(small.resize(image.size, Image.NEAREST))
        gained = logprobs(sample.turns, images) - logprobs(sample.turns, blurred)
        found[sample.id] = gained.clamp(min=0).numpy()
    return found


def test_what_is_destroyed_keeps_its_size_and_has_a_pixel_at_least():
    for size in ((100, 40), (7, 3), (1, 1), (14, 16)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
        found = destroy(image)
        assert (found.size, found.mode) == (size, "RGB")
        assert len(found.getcolors(10_000)) <= max(1, round(size[0] / 10)) * max(1, round(size[1] / 10))


def test_the_advantage_is_exact_before_it_is_stored(data, dense, tmp_path):
    stage = StageOne.open(stage_one_config(data, tmp_path / "cache", settings=ALONE))
    seen = set()
    for work in map(stage.batch_shard, range(stage.plan.shards)):
        for ready in map(stage.load, work.batches):
            values = stage.run(ready).values()
            for (planned, _), row in zip(ready.samples, values, strict=True):
                expected = dense[planned.sample.id]
                np.testing.assert_allclose(row["advantage"], expected, atol=1e-5)
                seen.add(planned.sample.id)
    assert seen == dense.keys()
    assert not dense[TEXT_ONLY["id"]].any()
    assert any(advantage.any() for advantage in dense.values())
    assert LARGEST == NATS_MAX


@pytest.mark.parametrize("shard_format", ["zarr", "webdataset"])
def test_what_is_stored_is_within_the_bound_of_its_byte(data, dense, tmp_path, shard_format):
    figures = write_cache(data, tmp_path / "cache", settings=ALONE, shard_format=shard_format)
    reader = CacheReader(tmp_path / "cache")
    for key in reader:
        row = reader.row(key)
        exact, found = dense[row.sample_id], row.values["advantage"]
        assert (np.abs(found - exact) <= np.sqrt(32 * exact) / 255 + 32 / 510**2 + 1e-5).all()
    answers = sum(map(len, dense.values()))
    assert sum(reader.encoded_fields(key, ["advantage"])["advantage"].parts["codes"].nbytes for key in reader) == answers
    assert figures["samples_done"] == len(SAMPLES)
    assert "advantage" in figures["bytes_by_field"]


def test_both_formats_have_one_content_and_rows_say_their_advantage(advantage_cache, tmp_path):
    result = CliRunner().invoke(main, ["cache", "convert", str(advantage_cache), str(tmp_path / "tar")])
    assert result.exit_code == 0, result.output
    assert content(tmp_path / "tar") == content(advantage_cache)
    reader = CacheReader(tmp_path / "tar")
    row = find_row(reader, GOLDEN_SAMPLES[0]["id"])
    assert row_arrays(reader, row)["advantage_A"].dtype == np.float32
    assert row_figures(reader, row)["mean_advantage"] == pytest.approx(float(row.values["advantage"].mean()))
    named = [piece for piece in row_pieces(reader, row, None) if "+" in piece]
    assert [float(piece.rsplit("+", 1)[1]) for piece in named] == pytest.approx(row.values["advantage"], abs=0.006)


def test_there_is_one_more_pass_for_a_batch_with_an_image_and_none_for_text(teacher_vlm, tmp_path, monkeypatch):
    passes = []
    stage_data = write_data(tmp_path / "data.json", SAMPLES)
    decode = type(teacher_vlm).decode
    monkeypatch.setattr(
        type(teacher_vlm), "decode", lambda vlm, batch, *a, **k: (passes.append(batch.samples), decode(vlm, batch, *a, **k))[1]
    )
    for settings, expected in ((WITH_ADVANTAGE, 2), (TargetSettings(), 1)):
        stage = StageOne.open(stage_one_config(stage_data, tmp_path / "cache", settings=settings))
        stage.use_tensors(stage.tensors())
        work = stage.batch_samples(0, range(len(SAMPLES)))
        samples = [one for batch in work.batches for one in batch]
        for chosen, count in ((samples, expected), ([s for s in samples if not s.sample.images], 1)):
            ready = stage.load(chosen)
            passes.clear()
            stage.run(ready)
            assert len(passes) == count
            if count == 2:
                assert passes[1] == sum(bool(s.sample.images) for s in samples)


def test_the_fingerprint_has_it_only_where_it_is_asked_for(cache, advantage_cache):
    before, after = CacheReader(cache).fingerprint["targets"], CacheReader(advantage_cache).fingerprint["targets"]
    assert "advantage" not in before
    assert after == {**before, "advantage": "bilinear to 0.1, nearest back"}


@pytest.fixture(scope="module")
def both_sources(advantage_cache, data, teacher_vlm):
    """A batch of all samples with the targets of a cache, and the same batch with an online teacher's."""
    student = load_vlm(STUDENT)
    preparer = Preparer.of(student, template=student.default_template, max_length=2048, image_root=IMAGES, with_destroyed=True)
    needs = frozenset({"logits", "advantage"})
    reader = CacheReader(advantage_cache)
    samples = TrainingSet(SampleFile(data), preparer, student=student, reader=reader, needs=needs, max_rejected=0)
    items = samples.collate([samples[i] for i in range(len(samples))])
    source = OnlineTeacher(load_vlm(TEACHER), student)
    return student, samples, items, source


def test_an_online_teacher_gives_the_target_of_the_cache(both_sources):
    student, _, items, source = both_sources
    _, online = source.fill(student, items["batch"], DecodedTargets(), frozenset({"logits", "advantage"}))
    cached = items["targets"].dequantise().advantage_A
    bound = (32 * online.advantage_A).sqrt() / 255 + 32 / 510**2 + 1e-5
    assert ((cached - online.advantage_A).abs() <= bound).all()
    assert source.fill(student, items["batch"], DecodedTargets(), frozenset({"logits"}))[1].advantage_A is None


def gradients(objective, parts, counts):
    objective.zero_grad()
    outcomes = [objective(batch, targets, counts) for batch, targets in parts]
    for outcome in outcomes:
        outcome["loss"].backward()
    terms = {name: sum(o["terms"][name] for o in outcomes) for name in outcomes[0]["terms"]}
    return terms, torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_batch_of_all_samples_is_as_many_batches_of_one(both_sources, autocast):
    student, samples, items, source = both_sources
    recipe = get_recipe("visual-advantage", {"token_lambda": "0.7"})
    teacher = source.teacher
    shape = TeacherShape(teacher.heads, teacher.hidden_size, teacher.layers)
    objective = Objective(student, recipe, shape, source, source.logit_codec).eval()
    singles = [samples.collate([samples[i]]) for i in range(len(samples))]
    counts: Counts = items["batch"].counts()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        whole = gradients(objective, [(items["batch"], Targets())], counts)
        parts = gradients(objective, [(one["batch"], Targets()) for one in singles], counts)
        plain = gradients(
            Objective(student, replace(recipe, token_weighting="uniform"), shape, source, source.logit_codec).eval(),
            [(items["batch"], Targets())],
            counts,
        )
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if autocast else {"rtol": 1e-4, "atol": 1e-6}
    for name, term in whole[0].items():
        torch.testing.assert_close(term, parts[0][name], **tolerance)
    torch.testing.assert_close(whole[1], parts[1], **tolerance)
    assert whole[0]["reverse_kl"] != plain[0]["reverse_kl"]
    torch.testing.assert_close(whole[0]["supervised"], plain[0]["supervised"])


@pytest.mark.slow
def test_a_student_trains_on_weighted_tokens(data, advantage_cache, tmp_path):
    train(data, advantage_cache, tmp_path / "out", recipe="visual-advantage", max_steps=2)
    train(data, advantage_cache, tmp_path / "plain", recipe="logits-only", max_steps=2)
    weighted, plain = metrics(tmp_path / "out")[0], metrics(tmp_path / "plain")[0]
    assert weighted["supervised"] == plain["supervised"]
    assert weighted["reverse_kl"] != plain["reverse_kl"]


def test_a_recipe_that_needs_it_is_refused_before_anything_is_loaded(data, cache, tmp_path):
    with pytest.raises(CacheError, match=r"needs advantage, which the cache does not hold.*--targets advantage,logits"):
        train(data, cache, tmp_path / "out", recipe="visual-advantage", student="nowhere")
    with pytest.raises(ConfigError, match=r"needs advantage.*use --targets advantage,attention,logits,vision"):
        write_cache(data, tmp_path / "cache", recipe="visual-advantage", teacher="nowhere")
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_counts_its_bytes_and_its_pass(data, tmp_path):
    arguments = ["cache-teacher", "--teacher", TEACHER, "--data", data, "--images", IMAGES, "--cache", tmp_path / "cache"]
    arguments += ["--targets", "logits,advantage", "--dry-run", "--json"]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["bytes_per_sample_by_field"]["advantage"] > 0
    assert figures["rejected_of_tried"] == 0
