"""Two settings that differ never share a cache, and the refusal says where they differ."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cache_samples import SPEC
from hypothesis import assume, given
from hypothesis import strategies as st

from alignkd.cache_store.errors import FingerprintMismatchError
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec, check_fingerprint, check_spec

LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
NAMES = st.text("abc", max_size=2)
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=2) | st.dictionaries(NAMES, v, max_size=3))
TREES = st.dictionaries(NAMES, VALUES, max_size=4)


@st.composite
def changed(draw: st.DrawFn) -> tuple[dict, dict]:
    """Two trees that differ in one leaf, which is changed, removed or added."""
    tree = draw(TREES)
    key, value = draw(NAMES), draw(LEAVES)
    assume(key not in tree or json.dumps(tree[key]) != json.dumps(value))
    other = {**tree, key: value}
    for parent in draw(st.lists(st.text("xyz", min_size=1, max_size=2), max_size=3)):
        tree, other = {parent: tree, "beside": 1}, {parent: other, "beside": 1}
    return draw(st.permutations([tree, other]))


@given(TREES)
def test_a_fingerprint_matches_itself(tree):
    check_spec(CacheSpec(SPEC.fields, json.loads(json.dumps(tree))), CacheSpec(SPEC.fields, tree), cache="here")


@given(changed())
def test_any_leaf_that_differs_is_refused(trees):
    found, wanted = trees
    with pytest.raises(FingerprintMismatchError, match="cache has"):
        check_spec(CacheSpec(SPEC.fields, found), CacheSpec(SPEC.fields, wanted), cache="here")


def test_every_differing_key_is_named_with_both_values_and_the_way_out():
    found = {"teacher": {"weights": "a" * 200, "template": "v1"}, "top_k": 8, "same": [1, 2]}
    wanted = {"teacher": {"weights": "a" * 199 + "b", "template": "v2"}, "seed": 3, "same": (1, 2)}
    with pytest.raises(FingerprintMismatchError) as caught:
        check_fingerprint(found, CacheSpec((), wanted).fingerprint, cache="/data/cache")
    message = str(caught.value)
    assert 'teacher.template: cache has "v1", wanted "v2"' in message
    assert "top_k: cache has 8, wanted nothing" in message
    assert "seed: cache has nothing, wanted 3" in message
    assert "same" not in message
    assert "/data/cache" in message
    assert "Write to another --cache, or use the settings the cache was written with" in message
    (weights,) = (line for line in message.splitlines() if "teacher.weights" in line)
    has, wants = weights.split(", wanted ")
    assert has.removeprefix("  teacher.weights: cache has ") != wants
    assert len(weights) < 250


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ({"a": {}}, {}),
        ({"a.b": 1}, {"a": {"b": 1}}),
        ({"a": 1}, {"a": True}),
        ({"a": None}, {}),
        ({"a": {"b": 1}}, {"a": 1}),
    ],
)
def test_settings_that_only_look_alike_differ(found, wanted):
    with pytest.raises(FingerprintMismatchError):
        check_fingerprint(found, wanted, cache="here")


def test_other_fields_are_refused_and_their_order_does_not_matter():
    check_spec(SPEC, replace(SPEC, fields=SPEC.fields[::-1]), cache="here")
    other = FieldSpec("vision", ("V", "D"), "float32", "int8-rows")
    with pytest.raises(FingerprintMismatchError, match=r'field.vision.codec: cache has "float16", wanted "int8-rows"'):
        check_spec(SPEC, replace(SPEC, fields=(SPEC.fields[0], other, *SPEC.fields[2:])), cache="here")


@pytest.mark.parametrize(
    "field",
    [
        ("../x", (), "float32", "exact"),
        ("x.y", (), "float32", "exact"),
        ("x", (), "object", "exact"),
        ("x", (), "nonsense", "exact"),
        ("x", (), "float32", "int8-rows"),
        ("x", ("T",), "int32", "float16"),
        ("x", (), "float32", "unknown"),
    ],
)
def test_a_field_that_cannot_be_stored_is_refused(field):
    with pytest.raises(ValueError, match="field"):
        FieldSpec(*field)


def test_two_fields_of_one_name_are_refused():
    with pytest.raises(ValueError, match="must differ"):
        CacheSpec((SPEC.fields[0], SPEC.fields[0]), {})


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
def test_a_fingerprint_that_json_cannot_hold_is_refused(value):
    with pytest.raises(ValueError, match="JSON"):
        CacheSpec((), {"x": value})
