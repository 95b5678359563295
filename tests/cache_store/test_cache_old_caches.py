"""Caches of released format versions stay readable: their committed bytes give the rows that they gave when written.

See tests/data/cache_v3/README.md. The digests in expected.json never change either.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from alignkd.cache_store.protocol.maintenance.convert import convert
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.reader import CacheReader

DATA = Path(__file__).parents[1] / "data"
EXPECTED = json.loads((DATA / "cache_v3" / "expected.json").read_text())


def digest(value: np.ndarray) -> str:
    """Of dtype, shape and little-endian values."""
    plain = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return hashlib.sha256(f"{plain.dtype.str} {list(value.shape)}\n".encode() + plain.tobytes()).hexdigest()


def rows_of(url: str | Path) -> dict[str, dict[str, object]]:
    reader = CacheReader(url)
    return {
        row.key: {
            "sample_id": row.sample_id,
            "image_sha256": row.image_sha256,
            "fields": {name: digest(value) for name, value in row.values.items()},
        }
        for row in reader.rows(reader)
    }


@pytest.fixture(params=["cache_v3", "cache_v3_webdataset"])
def cache(request) -> Path:
    return DATA / request.param


def test_an_audit_finds_no_problem_and_the_same_content(cache):
    report = verify(cache)
    assert (report.problems, report.strays, report.incomplete) == ([], [], 0)
    assert report.content_sha256 == EXPECTED["content_sha256"]
    assert (report.rows, report.rejected) == (len(EXPECTED["rows"]), len(EXPECTED["rejected"]))


def test_every_row_decodes_to_the_recorded_digests(cache):
    found = rows_of(cache)
    assert list(found) == list(EXPECTED["rows"])
    for key, row in EXPECTED["rows"].items():
        assert found[key] == row


def test_rejected_samples_and_tensors_are_the_recorded_ones(cache):
    reader = CacheReader(cache)
    assert {key: sample.sample_id for key, sample in reader.rejected.items()} == EXPECTED["rejected"]
    assert {name: digest(value) for name, value in reader.tensors.items()} == EXPECTED["tensors"]


def test_a_conversion_keeps_the_content(cache, tmp_path):
    report = verify(convert(cache, tmp_path / "converted").url)
    assert (report.problems, report.content_sha256) == ([], EXPECTED["content_sha256"])
    assert rows_of(tmp_path / "converted") == EXPECTED["rows"]
