"""Whatever a file of a cache holds, and whatever URL is given, the error is one of alignkd's own: never a library's."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cache_samples import contents, full_cache, overwrite

from alignkd.cache_store.errors import CorruptRecordError, StorageAccessError, StorageError
from alignkd.cache_store.protocol.commit import read_record
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.names import record_name
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import open_store
from alignkd.cache_store.storage import open_storage
from alignkd.errors import AlignkdError, CacheError, ConfigError

DEEP = "[" * 100_000
WRONG = [None, True, -1, 1.5, "", "x", "../x", [], [[]], ["x"], {}, {"x": []}, {"x": {"x": None}}]


def signed(content: dict[str, Any], name: str, **layout: Any) -> bytes:
    """JSON with the checksum that belongs to it: damage is found without it."""
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(plain.encode()).hexdigest()
    return (json.dumps({**content, name: digest}, sort_keys=True, **layout) + "\n").encode()


def every_place(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value in a tree of JSON."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(found for key, value in inside for found in every_place(value, (*path, key)))]


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = replaced(tree[path[0]], path[1:], value)
    return copy


@pytest.fixture
def storage(tmp_path):
    return full_cache(tmp_path / "cache")


def test_a_manifest_with_any_value_of_a_wrong_type_is_read_or_refused_as_a_cache(storage):
    content = json.loads(storage.read("cache.json"))
    del content["sha256"]
    refused = 0
    for path in every_place(content)[1:]:
        for value in WRONG:
            changed = replaced(content, path, value)
            (storage.root / "cache.json").write_bytes(signed(changed, "sha256", indent=2))
            try:
                open_store(storage.url)
            except CacheError as error:
                refused += "Restore it from a copy" in str(error) or "restore the folder plan/" in str(error)
    assert refused > 500


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", DEEP.encode(), b'{"a":' * 100_000, b"[]", b"3", b'{"format_version": []}'])
def test_what_is_no_json_of_a_manifest_or_a_record_is_refused(storage, data):
    overwrite(storage, record_name(0), data)
    with pytest.raises(CorruptRecordError, match=r"000000\.json.*alignkd cache repair"):
        read_record(storage, 0)
    assert len(verify(storage.url).problems) == 1
    overwrite(storage, "cache.json", data)
    for deed in (open_store, CacheReader, verify):
        with pytest.raises(CacheError, match=r"cache\.json"):
            deed(storage.url)


def test_a_record_with_any_value_of_a_wrong_type_is_read_or_refused(storage):
    content = json.loads(storage.read(record_name(1)))  # the shard with a rejected sample
    del content["record_sha256"]
    refused = 0
    for path in every_place(content)[1:]:
        for value in WRONG:
            changed = replaced(content, path, value)
            (storage.root / record_name(1)).write_bytes(signed(changed, "record_sha256", separators=(",", ":")))
            try:
                reader = CacheReader(storage.url)
                list(reader.rows(reader))
                open_store(storage.url).status().bytes_by_field  # noqa: B018
            except CacheError:
                refused += 1
    assert refused > 200


def npy(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, keys=np.zeros((10, 16), "u1"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        npz(),
        npy(np.array([print], dtype=object), allow_pickle=True),
        npy(np.zeros((10, 16), "f4")),
        npy(np.zeros(16, "u1")),
        npy(np.array(1, "u1")),
        npy(np.zeros((10, 16), "u1")),
        npy(np.zeros((9, 16), "u1")).replace(b"(9, 16)", b"(1<<60,)"),
        npy(np.zeros((99, 16), "u1")).replace(b"(99, 16)", b"(10**9,)"),
        npy(np.zeros((999999, 1), "u1"))[:128] + bytes(160),
    ],
)
def test_a_plan_of_other_arrays_under_the_right_names_is_refused(storage, data):
    content = json.loads(storage.read("cache.json"))
    del content["sha256"]
    digest = hashlib.sha256(data).hexdigest()
    content["plan"]["arrays"]["keys"] = digest
    storage.write(f"plan/keys-{digest[:12]}.npy", data)
    overwrite(storage, "cache.json", signed(content, "sha256", indent=2))
    with pytest.raises(CacheError, match=r"the plan of the cache .* cannot be read .*restore the folder plan/"):
        CacheReader(storage.url)


def test_a_plan_cannot_name_an_object_outside_the_cache(storage, tmp_path):
    content = json.loads(storage.read("cache.json"))
    del content["sha256"]
    (tmp_path / "secret").write_bytes(b"x")
    content["plan"]["arrays"]["../../secret"] = "a" * 64
    overwrite(storage, "cache.json", signed(content, "sha256", indent=2))
    with pytest.raises(CacheError, match="a plan cannot be"):
        open_store(storage.url)


@pytest.mark.parametrize("url", ["nonsense://x/y", "simplecache::nonsense://x", "github://nobody", "memory://", "s3:///"])
def test_a_url_that_cannot_be_opened_is_a_wrong_setting(url):
    with pytest.raises(ConfigError, match="--cache"):
        open_storage(url)


@pytest.mark.parametrize(("url", "module"), [("s3://bucket/cache", "s3fs"), ("gs://bucket/cache", "gcsfs")])
def test_a_package_that_is_not_installed_is_named(monkeypatch, url, module):
    from fsspec.registry import _registry

    monkeypatch.setitem(sys.modules, module, None)
    for protocol in ("s3", "gs"):
        if protocol in _registry:
            monkeypatch.delitem(_registry, protocol)
    with pytest.raises(ConfigError, match=rf"--cache {url.partition('b')[0]} needs the package {module}.*pip install"):
        open_storage(url)


def test_a_storage_that_cannot_write_says_so():
    from fsspec.implementations.memory import MemoryFileSystem

    def unsupported(*_args: object, **_options: object) -> None:
        raise NotImplementedError("read only")

    storage = open_storage("memory://read-only/cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFileSystem, "pipe_file", unsupported)
        with pytest.raises(StorageAccessError, match=r"cannot write memory://read-only/cache/a: .*This kind of storage"):
            storage.write("a", b"x")


def test_an_error_of_storage_is_not_taken_for_damage(storage, monkeypatch):
    """A shard, a plan or a record that cannot be read now is not a damaged one."""
    real = type(storage).read
    reader = CacheReader(storage.url)

    def failing(prefix: str) -> Callable[..., bytes]:
        def read(self: Any, name: str, at_most: int | None = None) -> bytes:
            if name.startswith(prefix):
                raise StorageError(f"cannot read {name}")
            return real(self, name, at_most)

        return read

    for prefix, deed in (
        ("plan/", lambda: open_store(storage.url)),
        ("cache.json", lambda: open_store(storage.url)),
        ("commits/", lambda: verify(storage.url)),
        ("shards/", lambda: list(reader.rows(reader))),
        ("tensors/", lambda: reader.tensors["head"]),
    ):
        monkeypatch.setattr(type(storage), "read", failing(prefix))
        with pytest.raises(StorageError) as caught:
            deed()
        assert isinstance(caught.value, AlignkdError)
        assert isinstance(caught.value, OSError)
        assert not isinstance(caught.value, CacheError)
    monkeypatch.setattr(type(storage), "read", real)
    assert contents(storage)
