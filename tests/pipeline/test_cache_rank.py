"""``alignkd cache rank``: samples by advantage and by divergence, and the share that is kept, ready to train on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny_runs import IMAGES, SAMPLES, STUDENT, TEACHER, TEXT_ONLY, train, write_cache, write_data

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.capture.attention import capture
from alignkd.cli import main
from alignkd.errors import ConfigError
from alignkd.models.loading import load_vlm
from alignkd.pipeline.config.rank import RankConfig
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.sample import parse_sample
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.rank.rank import rank
from alignkd.targets.logit_settings import LogitSettings

LOGITS = TargetSettings(targets=("logits", "advantage"), logits=LogitSettings("hidden", hidden_bits=16))


@pytest.fixture(scope="module")
def ranked_cache(tmp_path_factory, data):
    cache = tmp_path_factory.mktemp("rank") / "cache"
    write_cache(data, cache, settings=LOGITS)
    return cache


def advantages(cache):
    reader = CacheReader(cache)
    return {row.sample_id: float(row.values["advantage"].mean()) for row in reader.rows(list(reader))}


def ranking(figures_of):
    return sorted(figures_of, key=lambda name: -figures_of[name])


@pytest.mark.parametrize(("top", "kept"), [("50%", 3), (2, 2), ("1%", 1), (None, 6), (99, 6)])
def test_the_ids_of_the_kept_samples_are_written_by_advantage_best_first(ranked_cache, tmp_path, top, kept):
    figures = rank(RankConfig(cache=str(ranked_cache), top=top, out=str(tmp_path / "kept.jsonl")))
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    expected = advantages(ranked_cache)
    assert [line["id"] for line in lines] == ranking(expected)[:kept]
    assert [line["advantage"] for line in lines] == pytest.approx([expected[line["id"]] for line in lines], abs=1e-6)
    assert (figures["by"], figures["samples"], figures["kept"]) == ("advantage", 6, kept)
    assert figures["advantage_mean"] == pytest.approx(np.mean(list(expected.values())), abs=1e-6)
    assert figures["first"] == lines[:5]


def test_a_data_file_of_the_kept_samples_has_their_keys_and_order(ranked_cache, data, tmp_path):
    given = {"cache": str(ranked_cache), "data": str(data), "images": str(IMAGES), "top": "50%"}
    for name in ("half.json", "half.jsonl", "keys.txt"):
        rank(RankConfig(**given, out=str(tmp_path / name)))
    best = set(ranking(advantages(ranked_cache))[:3])
    for name in ("half.json", "half.jsonl"):
        kept = SampleFile(tmp_path / name)
        assert [kept[i].id for i in range(len(kept))] == [r["id"] for r in SAMPLES if r["id"] in best]
        assert {kept.key(i) for i in range(len(kept))} == set((tmp_path / "keys.txt").read_text().split())


@pytest.mark.slow
def test_the_kept_samples_train_from_the_same_cache(ranked_cache, data, tmp_path):
    out = str(tmp_path / "half.json")
    rank(RankConfig(cache=str(ranked_cache), data=str(data), images=str(IMAGES), top="50%", out=out))
    train(tmp_path / "half.json", ranked_cache, tmp_path / "out", recipe="visual-advantage", max_steps=1)


def test_a_sample_without_an_image_has_no_advantage_and_comes_last(ranked_cache):
    assert advantages(ranked_cache)[TEXT_ONLY["id"]] == 0
    figures = rank(RankConfig(cache=str(ranked_cache)))
    assert figures["first"][0]["advantage"] > 0


@pytest.mark.slow
def test_the_divergence_of_a_sample_is_that_of_the_students_answers_from_the_teachers(ranked_cache, data):
    given = {"student": str(STUDENT), "data": str(data), "images": str(IMAGES), "device": "cpu", "batch_size": 4}
    figures = rank(RankConfig(cache=str(ranked_cache), **given))
    expected = {}
    with torch.inference_mode():
        for record in SAMPLES:
            logprobs = {}
            for folder in (TEACHER, STUDENT):
                vlm = load_vlm(folder)
                preparer = Preparer.of(vlm, template=vlm.default_template, max_length=2048, image_root=IMAGES)
                batch = vlm.collate([preparer(parse_sample(record, "")).input])
                hidden = capture(vlm, batch, attention=False).hidden_AD
                logprobs[folder] = vlm.head(hidden).double().log_softmax(1)
            q, p = logprobs[STUDENT], logprobs[TEACHER]
            expected[record["id"]] = float((q.exp() * (q - p)).sum(1).mean())
    assert (figures["by"], figures["without_figure"]) == ("divergence", 0)
    assert [line["id"] for line in figures["first"]] == ranking(expected)[:5]
    for line in figures["first"]:
        assert line["divergence"] == pytest.approx(expected[line["id"]], rel=2e-3)
        assert "advantage" in line
    again = rank(RankConfig(cache=str(ranked_cache), **given, by="advantage"))
    assert [line["id"] for line in again["first"]] == ranking(advantages(ranked_cache))[:5]


def test_without_advantage_and_student_there_is_one_message_that_says_what_to_do(cache, tmp_path, caplog):
    result = CliRunner().invoke(main, ["cache", "rank", str(cache), "--out", str(tmp_path / "kept.jsonl")])
    assert result.exit_code == 2
    (message,) = caplog.messages
    assert "nothing to rank by" in message
    assert "advantage among --targets" in message
    assert "--student" in message
    assert not (tmp_path / "kept.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"student": "x"}, "give its --data"),
        ({"by": "divergence"}, "give --student"),
        ({"limit": 3}, "--limit belongs to --data"),
        ({"top": "150%"}, "--top"),
        ({"top": 0}, "--top"),
        ({"out": "kept.csv"}, r"ends in \.jsonl, \.txt"),
        ({"out": "DATA", "data": "DATA"}, "would be lost"),
        ({"student": "x", "data": "DATA", "recipe": "sft"}, "compares no answer distributions"),
    ],
)
def test_what_contradicts_itself_is_refused_before_the_work(ranked_cache, data, given, words):
    given = {name: str(data) if value == "DATA" else value for name, value in given.items()}
    with pytest.raises(ConfigError, match=words):
        rank(RankConfig(cache=str(ranked_cache), **given))


def test_the_command_prints_figures_and_samples_of_other_data_are_left_out(ranked_cache, tmp_path):
    some = write_data(tmp_path / "some.json", [*SAMPLES[:2], {**SAMPLES[2], "id": "another"}])
    arguments = ["cache", "rank", ranked_cache, "--data", some, "--images", IMAGES, "--top", "50%", "--json"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--out", str(tmp_path / "kept.json")])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert (figures["samples"], figures["kept"]) == (2, math.ceil(2 * 0.5))
    assert len(json.loads((tmp_path / "kept.json").read_text())) == 1
