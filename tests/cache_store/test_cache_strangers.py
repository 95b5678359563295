"""A shard is read by who has never heard of alignkd: with zarr alone, and with webdataset and numcodecs alone.

The two readers are those of docs/cache-format.md.
"""

from __future__ import annotations

import numpy as np
import pytest
from cache_samples import SPEC, make_rows
from shard_conformance import packed

from alignkd.cache_store import webdataset_shard, zarr_shard


def read_zarr(path):
    import json

    import zarr

    group = zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")
    fields = dict(group.groups())

    def part(field, name, i):
        first, last = field[f"{name}_offsets"][i : i + 2]
        return field[name][first:last]

    for i, (key, sample_id, _) in enumerate(json.loads(group["_index"][:].tobytes())):
        row = {}
        for name, field in fields.items():
            shape = tuple(field["shape"][i])
            if field.attrs["codec"] == "int8-rows":
                row[name] = part(field, "codes", i).reshape(shape) * part(field, "scales", i).reshape(shape[:-1])[..., None]
            else:
                row[name] = part(field, "values", i).reshape(shape).astype(field.attrs["dtype"])
        yield key, sample_id, row


def read_webdataset(path):
    import json

    import numpy as np
    import webdataset
    from numcodecs import Blosc

    for sample in webdataset.WebDataset(path, shardshuffle=False):
        described, row = json.loads(sample["json"]), {}
        for name, field in described["fields"].items():
            frames = {part: sample[f"{name}.{part}.blosc"] for part in field["parts"]}
            part = {p: np.frombuffer(Blosc().decode(f) if f else b"", field["parts"][p]) for p, f in frames.items()}
            if field["codec"] == "int8-rows":
                scales = part["scales"].reshape(field["shape"][:-1])
                row[name] = part["codes"].reshape(field["shape"]) * scales[..., None]
            else:
                row[name] = part["values"].reshape(field["shape"]).astype(field["dtype"])
        yield sample["__key__"], described["sample_id"], row


@pytest.mark.parametrize(
    ("needs", "version", "shard_format", "read"),
    [("zarr", "3", zarr_shard, read_zarr), ("webdataset", "0.2", webdataset_shard, read_webdataset)],
    ids=["zarr", "webdataset"],
)
def test_a_stranger_reads_every_row(tmp_path, needs, version, shard_format, read):
    pytest.importorskip(needs, minversion=version)
    shard = packed(SPEC, make_rows(5))
    path = tmp_path / f"shard{shard_format.SUFFIX}"
    path.write_bytes(shard_format.write_shard(shard))
    found = list(read(str(path)))
    assert [key for key, _, _ in found] == list(shard.keys)
    for i, (_, sample_id, values) in enumerate(found):
        expected = shard.row(i)
        assert sample_id == expected.sample_id
        assert values.keys() == expected.values.keys()
        for name, value in expected.values.items():
            assert (values[name].dtype, values[name].shape) == (value.dtype, value.shape)
            assert np.array_equal(values[name], value)
