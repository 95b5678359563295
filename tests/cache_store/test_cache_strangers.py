"""A shard can be read without alignkd: with zarr alone, and with webdataset and numcodecs alone.

The readers are the code blocks of docs/cache-format.md, unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cache_samples import key_of
from shard_conformance import packed

from alignkd.cache_store.codecs import CODECS
from alignkd.cache_store.formats import webdataset_shard, zarr_shard
from alignkd.cache_store.rows.row import Row
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec

DOCUMENT = Path(__file__).parents[2] / "docs" / "cache-format.md"
ROWS = tuple(FieldSpec(f"row_{i}", ("T", "V"), "float32", codec) for i, codec in enumerate(CODECS))
IMAGES = tuple(FieldSpec(f"image_{i}", ("V", "D"), "float32", codec, per_image=True) for i, codec in enumerate(CODECS))
SPEC = CacheSpec((*ROWS, *IMAGES, FieldSpec("mass", (), "float32", "exact"), FieldSpec("ids", ("T",), "int32", "exact")), {})


def recipe(name: str) -> Callable[[str], Iterator[tuple[str, str, dict[str, np.ndarray]]]]:
    """A function that the Python blocks of the document define."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL):
        if "def decode(" in block or f"def {name}(" in block:
            exec(block, names)
    return names[name]


def a_row(i: int, image: str) -> Row:
    rng, tokens, vision = np.random.default_rng(i), i % 3, 131 if image else 0
    per_row = {field.name: rng.random((tokens, vision), np.float32) for field in ROWS}
    per_image = {field.name: rng.random((vision // 2, 70), np.float32) for field in IMAGES}
    other = {"mass": np.array(rng.random(), np.float32), "ids": rng.integers(0, 9, tokens, np.int32)}
    return Row(key_of(i), f"sample-{i}/é", image * 64, {**per_row, **per_image, **other})


@pytest.mark.parametrize(
    ("needs", "shard_format", "reader"),
    [("zarr", zarr_shard, "read_zarr"), ("webdataset", webdataset_shard, "read_webdataset")],
    ids=["zarr", "webdataset"],
)
def test_a_stranger_reads_every_row_of_every_codec_by_the_document(tmp_path, needs, shard_format, reader):
    pytest.importorskip(needs)
    shard = packed(SPEC, [a_row(i, image) for i, image in enumerate(["a", "", "b", "a", "", "b", "a"])])
    path = tmp_path / f"shard{shard_format.SUFFIX}"
    path.write_bytes(shard_format.write_shard(shard))
    found = list(recipe(reader)(str(path)))
    assert [key for key, _, _ in found] == list(shard.keys)
    for i, (_, sample_id, values) in enumerate(found):
        expected = shard.row(i)
        assert sample_id == expected.sample_id
        assert values.keys() == expected.values.keys()
        for name, value in expected.values.items():
            assert (values[name].dtype, values[name].shape) == (value.dtype, value.shape)
            assert np.array_equal(values[name], value)
