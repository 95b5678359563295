"""Samples cut at the maximum length are counted from the loader to the figures, and reported once."""

from __future__ import annotations

import hashlib
import json

import pytest
from test_pipeline_distill_resume import sigterm_at
from tiny_runs import SAMPLES, metrics, record, student_sha256, train, without_time, write_cache, write_data

from alignkd.pipeline.runtime.signals import Interrupted

LONG = [record(f"long{i}", None, "How does it go on?", "Four. " * (400 + i)) for i in range(2)]
MAX_LENGTH = 300
"""Above every golden sample."""


@pytest.fixture(scope="module")
def long_data(tmp_path_factory):
    """Six samples of which none is cut, and two that are."""
    return write_data(tmp_path_factory.mktemp("long") / "samples.json", [*SAMPLES, *LONG])


@pytest.fixture(scope="module")
def long_cache(tmp_path_factory, long_data):
    folder = tmp_path_factory.mktemp("long") / "cache"
    write_cache(long_data, folder, max_length=MAX_LENGTH)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_samples_are_counted_in_every_line_and_reported_once(long_data, long_cache, tmp_path, caplog, workers):
    result = train(long_data, long_cache, tmp_path / "out", epochs=2.0, workers=workers)
    lines = metrics(tmp_path / "out")
    assert (result["samples"], result["truncated"]) == (16, 4)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["truncated"] == 4
    counts = [line["truncated"] for line in lines]
    assert counts == sorted(counts)
    assert (counts[3], counts[7]) == (2, 4)
    warnings = [record.message for record in caplog.records if "were cut there" in record.message]
    assert len(warnings) == 1
    assert f"longer than --max-length {MAX_LENGTH}" in warnings[0]


@pytest.mark.slow
def test_a_resumed_run_keeps_the_count_and_one_of_an_older_checkpoint_begins_at_zero(
    long_data, long_cache, tmp_path, monkeypatch
):
    train(long_data, long_cache, tmp_path / "whole", epochs=2.0)
    for name, older in (("new", False), ("old", True)):
        out = tmp_path / name
        with monkeypatch.context() as patch:
            sigterm_at(6, patch)
            with pytest.raises(Interrupted):
                train(long_data, long_cache, out, epochs=2.0)
        before = metrics(out)[-1]["truncated"]
        if older:
            path = out / "checkpoints" / "checkpoint-6" / "complete.json"
            complete = json.loads(path.read_text())
            del complete["state"]["metrics"]["truncated"], complete["state"]["metrics"]["since_line"]["truncated"]
            del complete["seal"]
            seal = hashlib.sha256(json.dumps(complete, sort_keys=True).encode()).hexdigest()
            path.write_text(json.dumps({**complete, "seal": seal}))
        kept = json.loads((out / "checkpoints" / "checkpoint-6" / "complete.json").read_text())["state"]["warnings"]
        assert "were cut there" in kept["truncated"]
        result = train(long_data, long_cache, out, epochs=2.0, resume=True)
        assert len([text for text in result["warnings"] if "were cut there" in text]) == 1
        assert result["truncated"] == 4 - (before if older else 0)
        assert student_sha256(out) == student_sha256(tmp_path / "whole")
        if not older:
            assert without_time(metrics(out)) == without_time(metrics(tmp_path / "whole"))


def test_a_run_without_truncated_samples_counts_none_and_says_nothing(data, cache, tmp_path, caplog):
    assert train(data, cache, tmp_path / "out", max_steps=3)["truncated"] == 0
    assert "were cut there" not in caplog.text
