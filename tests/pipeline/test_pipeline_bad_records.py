"""A record that cannot be read is one rejected sample in every job, with its number; the others go on."""

from __future__ import annotations

import json

import pytest
from tiny_runs import IMAGES, SAMPLES, STUDENT, record, train, write_cache, write_data

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.errors import DataError
from alignkd.pipeline.config.evaluate import EvaluateConfig
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.evaluate.runner import evaluate

BAD = [
    5,
    {"id": "nothing said", "conversations": []},
    record("function", None, "Be brief.", "why"),
    {"image": "0.png", "conversations": [{"from": "human", "value": 7}]},
    {**record("odd", "0.png", "<image>", "a"), "image": {"path": "0.png"}},
]
BAD[2]["conversations"][0]["from"] = "function"
READ = [
    record("svg", None, "Which SVG element shows a picture?", "<image>, with an href"),
    record("empty image", "", "why", "so"),
    record("no tag", "0.png", "What is it?", "a ball"),
    record("two tags", "0.png", "<image>\nWhat? <image>", "a ball"),
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Good and bad records in turn, so that plan, file and record numbers differ."""
    records = [*SAMPLES[:2], BAD[0], SAMPLES[0], *BAD[1:], *READ, *SAMPLES[2:]]
    return write_data(tmp_path_factory.mktemp("mixed") / "d.json", records)


@pytest.fixture(scope="module")
def mixed_cache(mixed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed") / "cache"
    return folder, write_cache(mixed, folder)


def test_stage_one_rejects_bad_records_by_number_and_caches_the_others(mixed, mixed_cache):
    folder, figures = mixed_cache
    rejected = {r.reason.split(":")[0]: r for r in CacheReader(folder).rejected.values()}
    assert set(rejected) == {
        "record 2",
        "record 4 (id 'nothing said')",
        "record 5 (id 'function')",
        "record 6",
        "record 7 (id 'odd')",
    }
    assert figures["new_samples"] == len(SAMPLES) + len(READ)
    file = SampleFile(mixed)
    assert {file.key(2), file.key(4)} <= set(CacheReader(folder).rejected)


def test_a_run_that_goes_on_reads_the_numbers_from_the_cache(mixed, tmp_path):
    figures = write_cache(mixed, tmp_path / "cache", rank=0, world_size=2, steal=False)
    assert figures["new_samples"] < len(SAMPLES) + len(READ)
    write_cache(mixed, tmp_path / "cache")
    reasons = [r.reason for r in CacheReader(tmp_path / "cache").rejected.values()]
    assert sorted(reason[:8] for reason in reasons) == [f"record {n}" for n in (2, 4, 5, 6, 7)]


def test_stage_two_and_evaluate_reject_the_same_records(mixed, mixed_cache, tmp_path):
    result = train(mixed, mixed_cache[0], tmp_path / "run", epochs=1.0)
    assert result["rejected"] == len(BAD)
    config = EvaluateConfig(
        model=str(STUDENT), data=str(mixed), images=str(IMAGES), out=str(tmp_path / "out"), max_new_tokens=2, device="cpu"
    )
    found = evaluate(config)
    assert found["rejected"] == len(BAD)
    assert found["answered"] == len(SAMPLES) + len(READ) + 1
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in lines} >= {"svg", "empty image", "no tag", "two tags"}


def test_a_file_of_bad_records_alone_is_refused_with_the_first_reasons(tmp_path):
    with pytest.raises(DataError, match=r"none of its 5 records can be read.*record 0: found a number"):
        write_cache(write_data(tmp_path / "d.json", BAD), tmp_path / "cache")
