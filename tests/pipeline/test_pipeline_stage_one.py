from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference.codec_errors import error_bound
from tiny_runs import IMAGES, SAMPLES, record, run_record, stage_one_config, write_cache, write_data

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import open_store
from alignkd.pipeline.cache_admin.row import row_arrays
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.rejected_samples import TooManyRejectedError
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.evaluate.show_sample import captured_arrays
from alignkd.pipeline.stage_one.dry_run import dry_run, spread
from alignkd.pipeline.stage_one.shard_work import PlannedSample, batches
from alignkd.pipeline.stage_one.teacher_stage import StageOne
from alignkd.targets.logits import LogitSettings
from tests.reference.logits import logprob_error


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def assert_within(codec, cached, exact, slack):
    assert cached.shape == exact.shape
    assert (np.abs(cached - exact) <= error_bound(codec, exact.astype(np.float32)) + slack).all()


def test_every_row_is_what_capture_gives_for_its_sample_alone(teacher_vlm, data, cache):
    reader, prepare = CacheReader(cache), Preparer.of(teacher_vlm, template="v1", max_length=2048, image_root=IMAGES)
    samples = SampleFile(data)
    assert len(reader) == len(samples) == 6
    for sample in (samples[i] for i in range(6)):
        row, alone = reader.row(sample.key), captured_arrays(teacher_vlm, prepare(sample))
        np.testing.assert_array_equal(row.values["input_ids"], alone["input_ids"])
        np.testing.assert_array_equal(row.values["labels"], alone["labels"])
        assert_within("sqrt8", row.values["attention"], alone["attention_HTV"], 1e-6)
        assert_within("int8-rows", row.values["vision_tokens"], alone["vision_tokens_VD"], 1e-4)
        logprobs = log_softmax(alone["answer_logits_AN"])
        arrays = row_arrays(reader, row)
        kept = np.take_along_axis(logprobs, arrays["topk_ids_AK"], axis=1)
        assert kept.shape == (len(alone["answer_logits_AN"]), 16)
        labels = alone["labels"][alone["labels"] >= 0]
        assert (arrays["topk_ids_AK"] == labels[:, None]).any(axis=1).all()
        assert (np.sort(kept, axis=1)[:, 1:] >= np.sort(logprobs, axis=1)[:, -15:] - 1e-4).all()
        bound = logprob_error(torch.from_numpy(kept)).numpy()
        tail = 1 - np.exp(kept).sum(axis=1)
        np.testing.assert_allclose(np.exp(row.values["tail_logmass"]), tail, rtol=2e-3, atol=1e-4)
        assert (np.abs(arrays["topk_logprobs_AK"] - kept) <= 2 * bound + 2e-3).all()
        np.testing.assert_allclose(arrays["tail_mass_A"], tail, rtol=0.05, atol=1e-3)


def test_a_sample_without_an_image_and_one_with_two_have_targets_of_their_own_shape(cache, data):
    reader, samples = CacheReader(cache), SampleFile(data)
    text, two = (reader.row(samples[i].key).values for i in (4, 5))
    assert text["attention"].shape[1:] == (0, 0)
    assert text["vision_tokens"].shape[0] == 0
    assert len(text["topk_rank_steps"]) > 0
    assert two["vision_tokens"].shape[0] == two["attention"].shape[2] == 288


def test_stored_attention_and_tail_are_probabilities(cache, data):
    for key in CacheReader(cache):
        reader = CacheReader(cache)
        values, arrays = reader.row(key).values, row_arrays(reader, reader.row(key))
        assert (values["attention"] >= 0).all()
        assert (values["attention"].sum(axis=2) <= 1.001).all()
        total = np.exp(arrays["topk_logprobs_AK"]).sum(axis=1) + arrays["tail_mass_A"]
        np.testing.assert_allclose(total, 1, atol=1e-4)


def test_a_head_mean_is_the_mean_of_the_heads(tmp_path, data, cache):
    settings = TargetSettings(targets=("attention",), attention="mean", attention_codec="exact")
    write_cache(data, tmp_path / "mean", settings=settings)
    per_head, mean = CacheReader(cache), CacheReader(tmp_path / "mean")
    assert {f.name for f in mean.spec.fields} == {"input_ids", "labels", "spans", "regions", "attention"}
    for key in mean:
        heads = per_head.row(key).values["attention"]
        assert heads.shape[0] == 8
        np.testing.assert_allclose(mean.row(key).values["attention"], heads.mean(axis=0, keepdims=True), atol=5e-4)


def test_top_k_may_be_more_than_the_vocabulary_and_then_keeps_everything(tmp_path, data):
    write_cache(
        data, tmp_path / "all", settings=TargetSettings(targets=("logits",), logits=LogitSettings("topk", top_k=10_000))
    )
    reader, samples = CacheReader(tmp_path / "all"), SampleFile(data)
    for values in (reader.row(samples[i].key).values for i in range(6)):
        assert values["topk_rank_steps"].shape[1] == 512
        assert (values["tail_logmass"] <= -100).all()
    write_cache(data, tmp_path / "all", settings=TargetSettings(targets=("logits",), logits=LogitSettings("topk", top_k=512)))


def test_batches_stay_under_the_budget_and_are_a_pure_function_of_the_samples(tmp_path, data):
    stage = StageOne.open(stage_one_config(data, tmp_path / "cache"))
    samples = [stage.samples[i] for i in range(6)]
    lengths = (10, 40, 30, 30, 5, 100)
    items = [
        PlannedSample(sample, replace(stage.preparer.text(sample), length=length))
        for sample, length in zip(samples, lengths, strict=True)
    ]
    first = list(batches(items, 80))
    assert first == list(batches(items[::-1], 80))
    assert [[item.length for item in batch] for batch in first] == [[100], [40, 30], [30, 10], [5]]
    for batch in first:
        assert len(batch) == 1 or len(batch) * max(item.length for item in batch) <= 80
    assert stage.load(first[1]).batch.samples == 2


@pytest.mark.slow
def test_an_image_is_stored_once_however_many_samples_share_it(tmp_path):
    """Samples of three images and none in turn, so that file order would put each image into every shard."""
    records = [
        record(f"s{i}", None if i % 4 == 3 else f"{i % 4}.png", "what" if i % 4 == 3 else "<image>\nWhat?", f"answer {i}")
        for i in range(16)
    ]
    data = write_data(tmp_path / "d.json", records)
    settings = TargetSettings(vision_codec="exact")
    once = write_cache(data, tmp_path / "cache", shard_samples=6, settings=settings)
    reader = CacheReader(tmp_path / "cache")
    rows = [reader.row(key) for key in reader]
    shards_of_image = {row.image_sha256: set() for row in rows if row.image_sha256}
    for row in rows:
        if row.image_sha256:
            shards_of_image[row.image_sha256].add(reader.shard_of(row.key))
    stored = sum(map(len, shards_of_image.values()))
    assert (len(shards_of_image), stored) == (3, 4)
    (vision,) = {row.values["vision_tokens"].nbytes for row in rows if row.image_sha256}
    assert open_store(tmp_path / "cache").status().decoded_bytes_by_field["vision_tokens"] == stored * vision
    apart = write_cache(data, tmp_path / "apart", shard_samples=1, settings=settings)
    assert apart["bytes_by_field"]["vision_tokens"] > 2 * once["bytes_by_field"]["vision_tokens"]
    alone = {row.key: row for row in CacheReader(tmp_path / "apart").rows(reader)}
    for row in rows:
        np.testing.assert_allclose(row.values["vision_tokens"], alone[row.key].values["vision_tokens"], atol=1e-5)


BAD = [
    record("missing", "none.png", "<image>\nWhat?", "This."),
    record("outside", "../samples.json", "<image>\nWhat?", "This."),
    record("empty answer", "0.png", "<image>\nWhat?", ""),
]


def test_rejected_samples_are_named_counted_and_left_out(tmp_path):
    data = write_data(tmp_path / "d.json", [SAMPLES[0], *BAD, SAMPLES[1]])
    done = write_cache(data, tmp_path / "cache")
    assert (done["samples_done"], done["samples_rejected"], done["samples"], done["complete"]) == (2, 3, 5, True)
    reasons = {r["id"]: r["reason"] for r in done["rejected"]}
    assert set(reasons) == {"missing", "outside", "empty answer"}
    assert "none.png: No such file" in reasons["missing"]
    assert "outside the image folder" in reasons["outside"]
    assert "no supervised token" in reasons["empty answer"]
    assert len(CacheReader(tmp_path / "cache")) == 2


def test_more_rejected_samples_than_allowed_stop_stage_one(tmp_path):
    data = write_data(tmp_path / "d.json", [SAMPLES[0], *BAD, SAMPLES[1]])
    with pytest.raises(
        TooManyRejectedError, match=r"3 samples cannot be used, more than --max-rejected 2.*missing.*Check --images"
    ):
        write_cache(data, tmp_path / "cache", max_rejected=2)


def test_rejected_samples_of_earlier_runs_count_too(tmp_path):
    data = write_data(tmp_path / "d.json", [*BAD[:2], SAMPLES[0], BAD[2]])
    assert not write_cache(data, tmp_path / "cache", max_rejected=2, rank=0, world_size=2)["complete"]
    with pytest.raises(TooManyRejectedError):
        write_cache(data, tmp_path / "cache", max_rejected=2)
    assert write_cache(data, tmp_path / "cache", max_rejected=3)["samples_rejected"] == 3


@pytest.mark.slow
def test_a_dry_run_estimates_and_writes_nothing(tmp_path, data):
    figures = dry_run(stage_one_config(data, tmp_path / "cache"))
    assert list(tmp_path.iterdir()) == []
    assert (figures["samples"], figures["shards"], figures["tried"], figures["template"]) == (6, 3, 6, "v1")
    real = write_cache(data, tmp_path / "cache", shard_samples=6)
    assert figures["tensor_bytes"] == pytest.approx(real["tensor_bytes"], abs=128 * 10)  # headers
    assert figures["bytes"] == pytest.approx(real["bytes"], rel=0.02)
    for name, size in real["bytes_by_field"].items():
        assert figures["bytes_per_sample_by_field"][name] == pytest.approx(size / 6, abs=1)
    assert figures["dense_bytes_per_sample_by_field"]["vision_tokens"] == real["dense_bytes_by_field"]["vision_tokens"] // 6
    assert figures["positions_per_sample"] * 6 == pytest.approx(real["tokens"], abs=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("--attention mean", {"settings": TargetSettings(attention="mean")}),
        ("--attention-codec sqrt4", {"settings": TargetSettings(attention_codec="sqrt4")}),
        ("--vision-codec int4-blocks", {"settings": TargetSettings(vision_codec="int4-blocks")}),
        ("--sketch-bytes 32", {"settings": TargetSettings(logits=LogitSettings(sketch_bytes=32))}),
        ("--alignment slice", {"alignment": "slice"}),
    ],
)
def test_a_dry_run_says_what_each_option_would_save_and_is_right(tmp_path, data, option, changes):
    figures = dry_run(stage_one_config(data, tmp_path / "cache"))
    real = write_cache(data, tmp_path / "cache", shard_samples=6, **changes)
    saved, said = figures["bytes"] - real["bytes"], figures["bytes"] - figures["bytes_with_option"][option]
    # The sketch's reduced head, kept once, shrinks with the sketch; the estimate counts rows alone.
    assert said == pytest.approx(saved, rel=0.05, abs=0.02 * figures["bytes"] + 30_000 * (option == "--sketch-bytes 32"))


def test_a_dry_run_tries_neighbours_spread_over_all_samples():
    assert spread(5, 32) == [0, 1, 2, 3, 4]
    chosen = spread(1000, 32)
    assert (len(chosen), chosen[:8], chosen[-1]) == (32, list(range(8)), 999)


def test_figures_of_a_cache_add_up(data, tmp_path):
    done = write_cache(data, tmp_path / "cache")
    kept = [file for name in ("shards", "tensors") for file in (tmp_path / "cache" / name).iterdir()]
    assert done["bytes"] == sum(file.stat().st_size for file in kept)
    assert sum(done["bytes_by_field"].values()) + done["tensor_bytes"] <= done["bytes"]
    assert done["dense_bytes_by_field"]["vision_tokens"] == 6 * 144 * 64 * 2
    made = run_record(tmp_path / "cache")
    assert made["command"] == "cache-teacher"
    assert (made["configuration"]["template"], made["configuration"]["worker"]) == ("v1", "0/1")
