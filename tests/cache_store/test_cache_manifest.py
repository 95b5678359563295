"""What a cache holds is written down once, with a checksum: anything that is not the same to the letter is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from cache_samples import FASTER, SPEC, all_names, flip, key_of, keys_array, make_store, overwrite, plan_of
from hypothesis import given
from hypothesis import strategies as st

from alignkd.cache_store.errors import FingerprintMismatchError
from alignkd.cache_store.protocol.manifest import FORMAT_VERSION, GROWN_VERSION, Manifest
from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.store import CacheStore, open_store

MANIFEST = Manifest(SPEC, "zarr", plan_of().summary())


def key_bytes(prefixes: list[int], last: list[int]) -> np.ndarray:
    """Keys of a few prefixes only, so that most share their first eight bytes."""
    pairs = sorted(set(zip(prefixes, last, strict=False)))
    keys = np.zeros((len(pairs), 16), np.uint8)
    keys[:, 7], keys[:, 15] = [p for p, _ in pairs], [q for _, q in pairs]
    return keys


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    prefixes, last = draw(st.lists(st.integers(0, 3), min_size=1, max_size=40)), draw(st.permutations(range(40)))
    keys = key_bytes(prefixes, [i % 7 for i in last])
    order = draw(st.permutations(range(len(keys))))
    return Plan(keys[order], draw(st.integers(1, 5)), {})


@given(plans(), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 8)), max_size=20))
def test_every_key_is_located_also_among_keys_that_begin_alike(plan, others):
    wanted = key_bytes([p for p, _ in others], [q for _, q in others])
    wanted = np.concatenate([plan.keys[::-1], wanted, np.full((1, 16), 255, np.uint8)])
    place = {key.tobytes(): i for i, key in enumerate(plan.keys)}
    assert plan.locate(wanted).tolist() == [place.get(key.tobytes(), -1) for key in wanted]


@given(plans())
def test_shards_hold_each_planned_sample_once_and_in_order(plan):
    keys = [key for shard in range(plan.shards) for key in plan.keys_of(shard)]
    assert keys == [bytes(key).hex() for key in plan.keys]
    assert all(len(plan.keys_of(shard)) == plan.shard_samples for shard in range(plan.shards - 1))
    assert [plan.shard_of(key) for key in keys] == [i // plan.shard_samples for i in range(len(keys))]


def test_nothing_is_located_where_nothing_is_asked_for():
    assert plan_of().locate(keys_array(0)).shape == (0,)
    assert plan_of().shard_of(key_of(99)) is None


def test_a_plan_comes_back_with_its_extras(tmp_path):
    store = make_store(tmp_path)
    plan = open_store(tmp_path).plan
    assert np.array_equal(plan.keys, keys_array(10))
    assert plan.extras["place"].tolist() == list(range(10))
    assert (plan.shard_samples, plan.meta, plan.summary()) == (4, {"seed": 1}, store.plan.summary())


@pytest.mark.parametrize(
    ("keys", "shard_samples", "message"),
    [
        (keys_array(3)[[0, 1, 0]], 2, "1 of 3 keys are repeated"),
        (keys_array(1)[:0], 2, "without samples"),
        (keys_array(3), 0, "at least 1"),
        (keys_array(3).astype("int32"), 2, "expected uint8"),
        (keys_array(3)[:, :15], 2, "expected uint8"),
    ],
)
def test_a_plan_that_cannot_be_one_is_refused(keys, shard_samples, message):
    with pytest.raises(ValueError, match=message):
        Plan(keys, shard_samples, {})


def test_extras_have_one_entry_a_sample():
    with pytest.raises(ValueError, match="one entry per sample"):
        Plan(keys_array(3), 2, {}, {"place": np.arange(2)})


def test_a_manifest_comes_back_and_every_damaged_character_is_found():
    text = MANIFEST.to_json()
    assert Manifest.from_json(text) == MANIFEST
    with pytest.raises(ValueError, match="its checksum does not match"):
        Manifest.from_json(text.replace('"top_k": 8', '"top_k": 9'))
    for at in range(len(text)):
        with pytest.raises(ValueError):  # noqa: PT011 - of every kind
            Manifest.from_json(text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :])
        with pytest.raises(ValueError):  # noqa: PT011 - as above
            Manifest.from_json(text[:at])


def test_another_format_version_is_refused_with_the_way_out():
    text = json.dumps({**json.loads(MANIFEST.to_json()), "format_version": 1})
    with pytest.raises(
        ValueError, match=f"found cache format 1, expected {FORMAT_VERSION} or {GROWN_VERSION}: read it with the alignkd"
    ):
        Manifest.from_json(text)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "1", '{"format_version": 3}'])
def test_what_is_no_manifest_is_refused(text):
    with pytest.raises(ValueError, match="not the manifest of a cache"):
        Manifest.from_json(text)


def test_a_manifest_does_not_depend_on_who_wrote_it():
    assert Manifest(replace(SPEC), "zarr", plan_of().summary()).to_json() == MANIFEST.to_json()


@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 1.0])
def test_a_damaged_manifest_is_refused_by_name_with_the_way_out(tmp_path, where):
    flip(make_store(tmp_path).storage, "cache.json", where)
    with pytest.raises(ValueError, match=r"cache.json: .*Restore it from a copy, or write a new cache"):
        open_store(tmp_path)


def test_a_folder_without_a_cache_is_refused_with_what_was_found(tmp_path):
    with pytest.raises(ValueError, match=r"no cache at .*: found nothing, expected cache.json; run alignkd cache"):
        open_store(tmp_path / "none")
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"found photo\.jpg, expected cache.json"):
        open_store(tmp_path)


@pytest.mark.parametrize("array", ["keys", "place"])
@pytest.mark.parametrize("damage", ["flip", "lost", "pickle"])
def test_a_damaged_plan_is_refused_by_name_with_the_way_out(tmp_path, array, damage):
    storage = make_store(tmp_path).storage
    (name,) = (name for name in all_names(storage) if name.startswith(f"plan/{array}-"))
    if damage == "flip":
        flip(storage, name, 1.0)
    elif damage == "lost":
        storage.delete(name)
    else:
        np.save(tmp_path / name, np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=rf"the plan of the cache .*{name}.*restore the folder plan/"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    ("plan", "shard_format", "named"),
    [
        (plan_of(order=slice(None, None, -1)), FASTER, "plan.keys: cache has"),
        (plan_of(samples=9), FASTER, "plan.samples: cache has 10, wanted 9"),
        (plan_of(shard_samples=5), FASTER, "plan.shard_samples: cache has 4, wanted 5"),
        (plan_of(), "zarr", 'format: cache has "webdataset", wanted "zarr"'),
    ],
)
def test_another_plan_or_format_is_refused_with_both_values(tmp_path, plan, shard_format, named):
    before = make_store(tmp_path)
    with pytest.raises(FingerprintMismatchError, match=named):
        CacheStore.create_or_open(tmp_path, SPEC, plan, shard_format=shard_format)
    assert open_store(tmp_path).manifest == before.manifest


def test_where_the_planner_found_the_samples_may_differ(tmp_path):
    make_store(tmp_path)
    moved = replace(plan_of(seed=2), extras={"place": np.arange(10) + 5})
    assert CacheStore.create_or_open(tmp_path, SPEC, moved, shard_format=FASTER).pending() == [0, 1, 2]


def test_settings_that_hold_tuples_are_the_same_settings_again(tmp_path):
    plan = replace(plan_of(), meta={"range": (1, 2)})
    for _ in range(2):
        store = CacheStore.create_or_open(tmp_path, SPEC, plan, shard_format=FASTER)
    assert store.manifest.plan["meta"] == {"range": [1, 2]}


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="unknown shard format 'parquet': expected one of zarr, webdataset"):
        make_store(tmp_path / "cache", shard_format="parquet")
    assert not (tmp_path / "cache").exists()


def test_a_damaged_manifest_is_not_replaced(tmp_path):
    storage = make_store(tmp_path).storage
    overwrite(storage, "cache.json", b"{}")
    with pytest.raises(ValueError, match=r"cache.json"):
        make_store(tmp_path)
    assert storage.read("cache.json") == b"{}"
