"""What is read from a cache is limited before it takes memory, and the limit on arrays is the user's."""

from __future__ import annotations

import json

import pytest
from cache_samples import full_cache, overwrite
from hypothesis import given
from hypothesis import strategies as st

from alignkd.cache_store import limits
from alignkd.cache_store.errors import CorruptShardError
from alignkd.cache_store.limits import load_json, max_decoded_bytes
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.errors import CacheError, ConfigError

TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=20,
)


@given(TREES)
def test_what_is_within_the_limits_is_read_as_it_was_written(tree):
    assert load_json(json.dumps(tree, ensure_ascii=True).encode()) == tree


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_depth_is_limited_and_brackets_in_texts_are_none(opening, closing):
    deepest = limits.MAX_JSON_DEPTH
    assert load_json((opening * deepest + "0" + closing * deepest).encode())
    with pytest.raises(ValueError, match="depth 65, at most 64"):
        load_json((opening * (deepest + 1) + "0" + closing * (deepest + 1)).encode())
    assert load_json(json.dumps('\\"' + "[" * 1000).encode()) == '\\"' + "[" * 1000


def test_length_is_limited(monkeypatch):
    monkeypatch.setattr(limits, "MAX_JSON_BYTES", 10)
    with pytest.raises(ValueError, match="found 11 bytes of JSON, at most 10"):
        load_json(b'"123456789"')


@pytest.mark.parametrize("text", [b"NaN", b"[Infinity]", b'{"a": -Infinity}', b"\xff", b"", b"[1" + b"0" * 5000 + b"]"])
def test_what_is_no_finite_json_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011
        load_json(text)


@pytest.mark.parametrize("text", ["nothing", "-1", "0", "nan", "inf", "1e30"])
def test_a_limit_that_is_no_size_is_named(text):
    with pytest.raises(ConfigError, match=rf"ALIGNKD_MAX_DECODED_GIB={text}: expected a number of GiB above 0"):
        max_decoded_bytes({"ALIGNKD_MAX_DECODED_GIB": text})


def test_shards_tensors_and_plans_beyond_the_limit_are_refused_and_the_setting_is_named(tmp_path, shard_format, monkeypatch):
    full_cache(tmp_path, shard_format=shard_format)
    reader = CacheReader(tmp_path)
    monkeypatch.setenv("ALIGNKD_MAX_DECODED_GIB", "0.00000001")
    with pytest.raises(CorruptShardError, match="ALIGNKD_MAX_DECODED_GIB"):
        reader.shard(0)
    with pytest.raises(CacheError, match=r"tensor 'head' .*ALIGNKD_MAX_DECODED_GIB"):
        reader.tensors["head"]
    with pytest.raises(CacheError, match=r"the plan of the cache .*ALIGNKD_MAX_DECODED_GIB"):
        CacheReader(tmp_path)
    monkeypatch.delenv("ALIGNKD_MAX_DECODED_GIB")
    assert verify(tmp_path).problems == []


def test_a_shard_that_grew_is_not_read(tmp_path):
    storage = full_cache(tmp_path)
    name = CacheReader(tmp_path).records[0].object
    overwrite(storage, name, b"")
    with (tmp_path / name).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptShardError, match=r"found 1099511627776 bytes, expected at most \d+ bytes"):
        CacheReader(tmp_path).shard(0)
