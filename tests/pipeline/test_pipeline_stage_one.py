from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess

import numpy as np
import pytest
from tiny_runs import (
    IMAGES,
    SAMPLES,
    TEACHER,
    content,
    record,
    stage_one_config,
    wait_until,
    with_other_weights,
    write_cache,
    write_data,
)
from warm_door import DOOR

from alignkd.batch import collate
from alignkd.cache_store.codecs import get_codec
from alignkd.cache_store.reader import CacheReader
from alignkd.cache_store.spec import FingerprintMismatch
from alignkd.cache_store.store import CacheStore, open_store
from alignkd.pipeline import cache_teacher as stage_one
from alignkd.pipeline.cache_teacher import Batchable, batches, cache_teacher, dry_run
from alignkd.pipeline.interrupt import Interrupted
from alignkd.pipeline.prepare import Preparer
from alignkd.pipeline.rejects import TooManyRejected
from alignkd.pipeline.samples import SampleFile
from alignkd.pipeline.show import captured_arrays
from alignkd.pipeline.targets_io import TargetSettings


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def assert_within(codec, cached, exact, slack):
    assert cached.shape == exact.shape
    assert (np.abs(cached - exact) <= get_codec(codec).error_bound(exact.astype(np.float32)) + slack).all()


def test_every_row_is_what_capture_gives_for_its_sample_alone(teacher_vlm, data, cache):
    reader, prepare = CacheReader(cache), Preparer.of(teacher_vlm, template="v1", max_length=2048, image_root=IMAGES)
    samples = SampleFile(data)
    assert len(reader) == len(samples) == 6
    for sample in (samples[i] for i in range(6)):
        row, alone = reader.row(sample.key), captured_arrays(teacher_vlm, prepare(sample))
        np.testing.assert_array_equal(row.values["input_ids"], alone["input_ids"])
        np.testing.assert_array_equal(row.values["labels"], alone["labels"])
        assert_within("float16", row.values["attention"], alone["attention_HTV"], 1e-6)
        assert_within("float16", row.values["vision_tokens"], alone["vision_tokens_VD"], 1e-4)
        logprobs = log_softmax(alone["answer_logits_AN"])
        kept = np.take_along_axis(logprobs, row.values["topk_ids"].astype(int), axis=1)
        assert kept.shape == (len(alone["answer_logits_AN"]), 64)
        assert_within("float16", row.values["topk_logprobs"], kept, 1e-4)
        np.testing.assert_allclose(kept, np.sort(logprobs, axis=1)[:, :-65:-1], atol=1e-4)
        np.testing.assert_allclose(np.exp(row.values["tail_logmass"]), 1 - np.exp(kept).sum(axis=1), atol=1e-4)


def test_a_sample_without_an_image_and_one_with_two_have_targets_of_their_own_shape(cache, data):
    reader, samples = CacheReader(cache), SampleFile(data)
    text, two = (reader.row(samples[i].key).values for i in (4, 5))
    assert text["attention"].shape[1:] == (0, 0)
    assert text["vision_tokens"].shape[0] == 0
    assert len(text["topk_ids"]) > 0
    assert two["vision_tokens"].shape[0] == two["attention"].shape[2] == 288


def test_stored_attention_and_tail_are_probabilities(cache, data):
    for key in CacheReader(cache):
        values = CacheReader(cache).row(key).values
        assert (values["attention"] >= 0).all()
        assert (values["attention"].sum(axis=2) <= 1.001).all()
        total = np.exp(values["topk_logprobs"]).sum(axis=1) + np.exp(values["tail_logmass"])
        np.testing.assert_allclose(total, 1, atol=5e-3)


def test_a_head_mean_is_the_mean_of_the_heads(tmp_path, data, cache):
    settings = TargetSettings(targets=("attention",), attention="mean", attention_codec="exact")
    write_cache(data, tmp_path / "mean", settings=settings)
    per_head, mean = CacheReader(cache), CacheReader(tmp_path / "mean")
    assert {f.name for f in mean.spec.fields} == {"input_ids", "labels", "attention"}
    for key in mean:
        heads = per_head.row(key).values["attention"]
        assert heads.shape[0] == 8
        np.testing.assert_allclose(mean.row(key).values["attention"], heads.mean(axis=0, keepdims=True), atol=5e-4)


def test_top_k_may_be_more_than_the_vocabulary_and_then_keeps_everything(tmp_path, data):
    write_cache(data, tmp_path / "all", settings=TargetSettings(targets=("logits",), top_k=10_000))
    reader, samples = CacheReader(tmp_path / "all"), SampleFile(data)
    for values in (reader.row(samples[i].key).values for i in range(6)):
        assert values["topk_ids"].shape[1] == 512
        assert (values["tail_logmass"] == -np.inf).all()
    write_cache(data, tmp_path / "all", settings=TargetSettings(targets=("logits",), top_k=512))


def test_batches_stay_under_the_budget_and_are_a_pure_function_of_the_samples(teacher_vlm, data):
    prepare, samples = Preparer.of(teacher_vlm, template="v1", max_length=2048, image_root=IMAGES), SampleFile(data)
    items = [Batchable(samples[i], prepare(samples[i]), length) for i, length in enumerate((10, 40, 30, 30, 5, 100))]
    first = list(batches(items, 80))
    assert first == list(batches(items[::-1], 80))
    assert [[item.length for item in batch] for batch in first] == [[100], [40, 30], [30, 10], [5]]
    for batch in first:
        assert len(batch) == 1 or len(batch) * max(item.length for item in batch) <= 80
    padded = collate([item.prepared.input for item in first[1]], vision_tokens_per_image=144, pad_token_id=0)
    assert padded.samples == 2


def stop_after(shards, monkeypatch):
    """Have SIGTERM come while shard ``shards`` is being prepared."""
    calls, real = itertools.count(1), stage_one.StageOne.prepare

    def prepare(self, indices, rejects):
        if next(calls) > shards:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, indices, rejects)

    monkeypatch.setattr(stage_one.StageOne, "prepare", prepare)


@pytest.mark.parametrize("shards", [0, 1, 2])
def test_a_stopped_run_goes_on_with_what_is_left_and_ends_with_the_same_content(tmp_path, data, cache, monkeypatch, shards):
    with monkeypatch.context() as patch:
        stop_after(shards, patch)
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM; run the same command again"):
            write_cache(data, tmp_path / "cache")
    assert open_store(tmp_path / "cache").status().shards_done == shards
    done = write_cache(data, tmp_path / "cache")
    assert done["new_samples"] == 6 - 2 * shards
    assert done["complete"]
    assert content(tmp_path / "cache") == content(cache)
    assert write_cache(data, tmp_path / "cache")["new_samples"] == 0


def test_a_crash_between_shard_and_record_leaves_nothing_that_counts(tmp_path, data, cache, monkeypatch):
    from alignkd.cache_store import store

    def crash(root, record, payload):
        (root / record.object).parent.mkdir(exist_ok=True)
        (root / record.object).write_bytes(payload[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "commit", crash)
        with pytest.raises(KeyboardInterrupt):
            write_cache(data, tmp_path / "cache")
    assert open_store(tmp_path / "cache").status().shards_done == 0
    assert write_cache(data, tmp_path / "cache")["new_samples"] == 6
    assert content(tmp_path / "cache") == content(cache)


def test_sigterm_ends_the_real_process_with_exit_code_75_and_a_rerun_completes_the_same_cache(tmp_path):
    records = [{**SAMPLES[i % 4], "id": f"s{i}"} for i in range(16)]
    data = write_data(tmp_path / "many.json", records)
    arguments = ["cache-teacher", "--teacher", TEACHER, "--data", data, "--images", IMAGES, "--device", "cpu"]
    arguments += ["--shard-samples", "1", "--cache", tmp_path / "cache", "--targets", "attention"]
    commits = tmp_path / "cache" / "commits"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([DOOR, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: process.poll() is not None or list(commits.glob("0*.json")))
        process.send_signal(signal.SIGTERM)
        _, words = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped by SIGTERM; run the same command again to go on" in words
    assert "Traceback" not in words
    before = len(list(commits.glob("0*.json")))
    assert 1 <= before < 16
    settings = TargetSettings(targets=("attention",))
    rest = write_cache(data, tmp_path / "cache", shard_samples=1, settings=settings)
    assert (rest["new_samples"], rest["complete"]) == (16 - before, True)
    write_cache(data, tmp_path / "undisturbed", shard_samples=1, settings=settings)
    assert content(tmp_path / "cache") == content(tmp_path / "undisturbed")


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
    with pytest.raises(TooManyRejected, match=r"3 samples cannot be used, more than --max-rejected 2.*missing.*Check --images"):
        write_cache(data, tmp_path / "cache", max_rejected=2)


def test_rejected_samples_of_earlier_runs_count_too(tmp_path, monkeypatch):
    data = write_data(tmp_path / "d.json", [*BAD[:2], SAMPLES[0], BAD[2]])
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(Interrupted):
            write_cache(data, tmp_path / "cache", max_rejected=3)
    with pytest.raises(TooManyRejected):
        write_cache(data, tmp_path / "cache", max_rejected=2)
    assert write_cache(data, tmp_path / "cache", max_rejected=3)["samples_rejected"] == 3


def test_a_dry_run_estimates_and_writes_nothing(tmp_path, data):
    figures = dry_run(stage_one_config(data, tmp_path / "cache"))
    assert list(tmp_path.iterdir()) == []
    assert (figures["samples"], figures["shards"], figures["tried"], figures["template"]) == (6, 3, 6, "v1")
    real = write_cache(data, tmp_path / "cache", shard_samples=6)
    assert figures["bytes"] == pytest.approx(real["bytes"], rel=0.05)
    assert figures["positions_per_sample"] * 6 == pytest.approx(real["tokens"], abs=1)


def test_figures_of_a_cache_add_up(data, tmp_path):
    done = write_cache(data, tmp_path / "cache")
    assert done["bytes"] == sum(f.stat().st_size for f in (tmp_path / "cache" / "shards").iterdir())
    assert sum(done["bytes_by_field"].values()) <= done["bytes"]
    assert done["dense_bytes_by_field"]["vision_tokens"] == 6 * 144 * 64 * 2
    record = json.loads((tmp_path / "cache" / "run.json").read_text())
    assert record["command"] == "cache-teacher"
    assert record["configuration"]["template"] == "v1"


CHANGES = {
    "teacher": ({}, ["fingerprint.teacher.weights"]),
    "data": ({}, ["fingerprint.data"]),
    "template": ({"template": "plain"}, ['fingerprint.template: cache has "v1", wanted "plain"']),
    "max length": ({"max_length": 99}, ["fingerprint.max_length: cache has 2048, wanted 99"]),
    "dtype": ({"dtype": "bfloat16"}, ['fingerprint.teacher.dtype: cache has "float32", wanted "bfloat16"']),
    "top-k": ({"settings": TargetSettings(top_k=5)}, ["fingerprint.targets.logits.top_k: cache has 64, wanted 5"]),
    "temperature": ({"settings": TargetSettings(temperature=2.0)}, ["logits.temperature: cache has 1.0, wanted 2.0"]),
    "attention": ({"settings": TargetSettings(attention="mean")}, ['targets.attention: cache has "per-head", wanted "mean"']),
    "targets": ({"settings": TargetSettings(targets=("vision",))}, ["targets.attention: cache has", "wanted null"]),
    "codec": ({"settings": TargetSettings(vision_codec="exact")}, ['codec: cache has "float16", wanted "exact"']),
    "shard samples": ({"shard_samples": 3}, ["plan.shard_samples: cache has 2, wanted 3"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_cache_of_other_settings_is_refused_with_both_values_and_the_way_out(tmp_path, data, cache, name):
    changes, parts = CHANGES[name]
    if name == "teacher":
        changes = {"teacher": str(with_other_weights(TEACHER, tmp_path / "other"))}
    if name == "data":
        data = write_data(tmp_path / "other.json", [*SAMPLES[:5], record("new", None, "a", "b")])
    before = sorted((p, p.stat().st_mtime_ns) for p in cache.rglob("*"))
    with pytest.raises(FingerprintMismatch) as error:
        write_cache(data, cache, **changes)
    for part in [*parts, str(cache), "cache has", "wanted", "Write to another --cache, or use the settings"]:
        assert part in str(error.value)
    assert sorted((p, p.stat().st_mtime_ns) for p in cache.rglob("*")) == before


def test_what_does_not_change_the_targets_may_change_between_runs(tmp_path, data, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(Interrupted):
            write_cache(data, tmp_path / "cache")
    moved = write_data(tmp_path / data.name, SAMPLES)
    assert cache_teacher(stage_one_config(moved, tmp_path / "cache", batch_tokens=400, max_rejected=3))["complete"]


def test_two_workers_on_one_cache_harm_nobody(tmp_path, data, cache, monkeypatch):
    """A second run starts while the first is in the middle of a shard, and finishes before it."""
    real, nested = CacheStore.commit_shard, []

    def commit_shard(self, number, *arguments, **keywords):
        if not nested:
            nested.append(number)
            assert write_cache(data, tmp_path / "cache")["new_samples"] == 6
        return real(self, number, *arguments, **keywords)

    monkeypatch.setattr(CacheStore, "commit_shard", commit_shard)
    assert write_cache(data, tmp_path / "cache")["complete"]
    assert content(tmp_path / "cache") == content(cache)
