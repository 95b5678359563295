"""Two settings that differ never share a cache, and the refusal says where they differ."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cache_samples import SPEC
from hypothesis import given
from hypothesis import strategies as st

from alignkd.cache_store.spec import CacheSpec, FieldSpec, FingerprintMismatch, check_fingerprint, check_spec

LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False)
TREES = st.dictionaries(
    st.text(max_size=4),
    st.recursive(LEAVES, lambda t: st.lists(t, max_size=2) | st.dictionaries(st.text(max_size=3), t, max_size=3)),
    max_size=4,
)


@given(TREES.filter(lambda tree: "inf" not in json.dumps(tree).lower()))
def test_a_spec_comes_back_from_json_and_matches_itself(tree):
    spec = CacheSpec(SPEC.fields, tree)
    assert CacheSpec.from_json(spec.to_json()) == spec
    check_spec(CacheSpec.from_json(spec.to_json()), spec, cache="here")


def test_every_differing_key_is_named_with_both_values_and_the_way_out():
    found = {"teacher": {"weights": "a" * 200, "template": "v1"}, "top_k": 8, "same": [1, 2]}
    wanted = {"teacher": {"weights": "a" * 199 + "b", "template": "v2"}, "seed": 3, "same": (1, 2)}
    with pytest.raises(FingerprintMismatch) as caught:
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
    with pytest.raises(FingerprintMismatch):
        check_fingerprint(found, wanted, cache="here")


def test_other_fields_are_refused_and_their_order_does_not_matter():
    check_spec(SPEC, replace(SPEC, fields=SPEC.fields[::-1]), cache="here")
    other = FieldSpec("vision", ("V", "D"), "float32", "int8-rows")
    with pytest.raises(FingerprintMismatch, match=r'field.vision.codec: cache has "float16", wanted "int8-rows"'):
        check_spec(SPEC, replace(SPEC, fields=(SPEC.fields[0], other, *SPEC.fields[2:])), cache="here")


def test_another_format_version_is_refused():
    text = json.dumps({**json.loads(SPEC.to_json()), "format_version": 2})
    with pytest.raises(ValueError, match="found cache format 2, expected 1"):
        CacheSpec.from_json(text)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"format_version": 1, "fields": [{}], "fingerprint": {}}'])
def test_what_is_no_spec_is_refused(text):
    with pytest.raises(ValueError, match="not the description of a cache"):
        CacheSpec.from_json(text)


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
