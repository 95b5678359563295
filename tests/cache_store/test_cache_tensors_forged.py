"""Tensors that someone forged: each is refused before it can do harm."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_samples import (
    SPEC,
    TENSORS,
    make_store,
    plan_of,
)

from alignkd.cache_store.errors import DamagedTensorError
from alignkd.cache_store.protocol.manifest import Manifest
from alignkd.cache_store.protocol.tensors import TensorEntry, Tensors, write_tensors
from alignkd.cache_store.storage.local import LocalStorage


def forged(folder: Path, content: bytes, **changes: object) -> Tensors:
    """A tensor of float32 [2, 3] whose manifest fits the object's length and sha256, but whose object holds ``content``."""
    storage = LocalStorage(folder)
    (entry,) = write_tensors(storage, {"x": np.zeros((2, 3), np.float32)}).values()
    entry = replace(entry, sha256=hashlib.sha256(content).hexdigest(), **changes)
    storage.write(entry.object, content)
    return Tensors(storage, {"x": entry})


def npy(array: np.ndarray, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 2), "f4"),
        np.zeros((2, 3), "i4"),
        np.zeros((2, 3), ">f4"),
        np.zeros(6, "f4"),
        np.asfortranarray(np.zeros((2, 3), "f4")),
    ],
    ids=["shape", "dtype", "byte order", "flat", "fortran"],
)
def test_a_header_that_says_other_than_the_manifest_is_refused(tmp_path, array):
    content = npy(array)
    with pytest.raises(DamagedTensorError, match=r"its header is not that of <f4 \[2, 3\]"):
        forged(tmp_path, content)["x"]


def test_a_pickled_array_is_refused_unopened(tmp_path):
    content = npy(np.array([print], dtype=object), pickled=True)
    with pytest.raises(DamagedTensorError, match="expected 152 bytes"):
        forged(tmp_path, content)["x"]
    with pytest.raises(DamagedTensorError, match="its header is not that"):
        forged(tmp_path, content.ljust(152, b"\0")[:152])["x"]


def test_an_object_of_another_size_is_refused_before_it_is_read(tmp_path, monkeypatch):
    tensors = make_store(tmp_path, tensors=TENSORS).tensors
    monkeypatch.setattr(LocalStorage, "size", lambda self, name: 1 << 50)
    monkeypatch.setattr(LocalStorage, "read", lambda self, name, at_most: pytest.fail("read"))
    with pytest.raises(DamagedTensorError, match=f"found {1 << 50} bytes"):
        tensors["head"]


ENTRY = {"dtype": "<f4", "shape": [2, 3], "bytes": 152, "sha256": "a" * 64}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("../x", {}),
        ("x", {"dtype": "|O"}),
        ("x", {"dtype": ">f4"}),
        ("x", {"dtype": "float32"}),
        ("x", {"shape": [2, 4]}),
        ("x", {"shape": [-2, -3]}),
        ("x", {"shape": [2.0, 3]}),
        ("x", {"shape": [2, True]}),
        ("x", {"shape": [1 << 62, 1 << 62]}),
        ("x", {"shape": [2, 3] + [1] * 50}),
        ("x", {"shape": "23"}),
        ("x", {"shape": 6}),
        ("x", {"bytes": 151}),
        ("x", {"bytes": "152"}),
        ("x", {"sha256": "../../" + "a" * 58}),
        ("x", {"sha256": 7}),
        ("x", {"more": 1}),
    ],
)
def test_an_entry_that_no_tensor_can_have_is_refused(name, change):
    content = json.loads(Manifest(SPEC, "zarr", plan_of().summary()).to_json())
    del content["sha256"]

    def text(entry: dict) -> str:
        body = {**content, "tensors": {name: entry}}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        return json.dumps({**body, "sha256": digest}, indent=2, sort_keys=True) + "\n"

    if name == "x":
        assert Manifest.from_json(text(ENTRY)).tensors["x"] == TensorEntry("x", **ENTRY)
    with pytest.raises(ValueError, match=r"tensor|not the manifest of a cache"):
        Manifest.from_json(text({**ENTRY, **change}))
