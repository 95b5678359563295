"""Every value of a row lies where a teacher could have put it: the audit and the reader refuse what none can give."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from cache_samples import full_cache, overwrite
from forged_rows import forge, reshape, set_all
from hypothesis import given, settings
from hypothesis import strategies as st
from teacher_rows import PER_IMAGE, VOCABULARY, spec_of, teacher_cache

from alignkd.cache_store.errors import CorruptShardError
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.names import record_name
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.rows import ranges
from alignkd.cache_store.rows.shard import ColumnShard
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec
from alignkd.errors import CacheError
from alignkd.targets import logit_levels

KINDS = ["topk", "sampled", "sketch", "hidden"]
ATTENTION = ["sqrt8", "sqrt4", "float16", "int8-rows", "exact"]
VISION = ["int8-rows", "int4-blocks", "float16", "exact"]


def read_all(url) -> int:
    reader = CacheReader(url)
    names = [field.name for field in reader.spec.fields]
    return len([reader.encoded_fields(key, names) for key in reader])


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    attention=st.sampled_from(ATTENTION),
    vision=st.sampled_from(VISION),
    heads=st.sampled_from(["per-head", "mean"]),
    shard_format=st.sampled_from(["zarr", "webdataset"]),
    seed=st.integers(0, 10_000),
    sharp=st.sampled_from([0.0, 0.3, 1.0, 3.0, 10.0, 60.0]),
)
@pytest.mark.slow
def test_whatever_a_teacher_gives_is_accepted(tmp_path_factory, kind, attention, vision, heads, shard_format, seed, sharp):
    spec = spec_of(kind, attention, vision, heads)
    store = teacher_cache(tmp_path_factory.mktemp("any") / "cache", spec, shard_format, seed=seed, sharp=sharp)
    assert verify(store.url).problems == []
    assert read_all(store.url) == 20


TOPK_FIELDS = ("topk_rank_steps", "topk_logprob_codes", "tail_logmass", "sketch")
FORGERIES = {
    "tail that is not a number": ("sketch", "tail_logmass", set_all("tail_logmass", "values", np.nan)),
    "tail of e^60000": ("sketch", "tail_logmass", set_all("tail_logmass", "values", 60000)),
    "tail below the lowest": ("sketch", "tail_logmass", set_all("tail_logmass", "values", -101)),
    "tail of everything": ("sketch", "tail_logmass", set_all("tail_logmass", "values", 0)),
    "tail of nothing": ("sketch", "tail_logmass", set_all("tail_logmass", "values", -100)),
    "log-sum-exp that is not finite": ("topk", "logsumexp", set_all("logsumexp", "values", np.inf)),
    "attention of 60000": ("sketch", "attention", set_all("attention", "scales", 60000)),
    "attention of 1.1": ("sketch", "attention", set_all("attention", "scales", 1.1)),
    "negative attention": ("sketch", "attention", set_all("attention", "scales", -0.5)),
    "attention that is not a number": ("sketch", "attention_3", set_all("attention_3", "scales", np.nan)),
    "attention rows of more than 1": ("sketch", "attention", set_all("attention", "codes", 255)),
    "rank beyond the vocabulary": ("sketch", "topk_rank_steps", set_all("topk_rank_steps", "values", 65535)),
    "rank just beyond the vocabulary": ("sketch", "topk_rank_steps", set_all("topk_rank_steps", "values", VOCABULARY // 5)),
    "the same token twice": ("sketch", "topk_rank_steps", set_all("topk_rank_steps", "values", 0)),
    "unknown level": ("sketch", "topk_logprob_codes", set_all("topk_logprob_codes", "values", 59)),
    "kept tokens of more than 1": ("sketch", "tail_logmass", set_all("topk_logprob_codes", "values", 0)),
    "kept tokens of nothing": ("sketch", "tail_logmass", set_all("topk_logprob_codes", "values", 58)),
    "drawn rank beyond": ("sampled", "draw_rank_steps", set_all("draw_rank_steps", "values", 300)),
    "drawn level unknown": ("sampled", "draw_logprob_codes", set_all("draw_logprob_codes", "values", 200)),
    "negative scales of vision tokens": ("sketch", "vision_tokens", set_all("vision_tokens", "scales", -1)),
    "vision tokens beyond float32": ("sketch", "vision_tokens", set_all("vision_tokens", "scales", 3e38)),
    "hidden state that is not finite": ("hidden", "hidden", set_all("hidden", "scales", np.inf)),
    "region that is not a number": ("sketch", "regions", set_all("regions", "values", np.nan)),
    "region of half a token": ("sketch", "regions", set_all("regions", "values", 0.5)),
    "region of other tokens": ("sketch", "regions", set_all("regions", "values", 3)),
    "span before the text": ("sketch", "spans", set_all("spans", "values", -1)),
    "id beyond the vocabulary": ("sketch", "input_ids", set_all("input_ids", "values", VOCABULARY)),
    "another label than its id": ("sketch", "labels", set_all("labels", "values", 7)),
    "no label": ("sketch", "", set_all("labels", "values", -100)),
    "5 answers too many": ("sketch", "", reshape(0, 5, *TOPK_FIELDS)),
    "an answer too many in one field": ("sketch", "", reshape(0, 1, "sketch")),
    "one kept token more": ("sketch", "topk_rank_steps", reshape(1, 1, "topk_rank_steps")),
    "a sketch too short": ("sketch", "sketch", reshape(1, -1, "sketch")),
    "one draw less": ("sampled", "draw_rank_steps", reshape(1, -1, "draw_rank_steps")),
    "vision tokens too narrow": ("sketch", "vision_tokens", reshape(1, -2, "vision_tokens")),
    "a vision token too many": ("sketch", "vision_tokens", reshape(0, 1, "vision_tokens")),
    "hidden states too narrow": ("hidden", "hidden", reshape(1, -1, "hidden")),
    "a head too many": ("sketch", "attention", reshape(0, 1, "attention")),
    "a text row too many": ("sketch", "", reshape(1, 1, "attention", "attention_3")),
    "a vision column too many": ("sketch", "", reshape(2, 1, "attention", "attention_3")),
    "attention of other rows in one layer": ("sketch", "attention", reshape(1, 1, "attention_3")),
    "spans of three numbers": ("sketch", "spans", reshape(1, 1, "spans")),
    "regions of nine numbers": ("sketch", "regions", reshape(1, 1, "regions")),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_what_no_teacher_gives_is_refused_by_the_audit_and_by_the_reader(tmp_path, shard_format, name):
    kind, field, change = FORGERIES[name]
    store = teacher_cache(tmp_path, spec_of(kind), shard_format)
    forge(tmp_path, change)
    (problem,) = verify(tmp_path).problems
    assert str(problem).startswith("shard 1 of the cache at")
    assert "row " in str(problem)
    assert f"field '{field}" in str(problem)
    assert problem.objects[0] == record_name(1)
    with pytest.raises(CorruptShardError, match=rf"^shard 1 of .*row [0-9a-f]{{32}} \(sample 'sample-.*field '{field}"):
        read_all(tmp_path)
    assert len(store.plan.keys_of(1)) == len(problem.keys)


@pytest.mark.parametrize("row", range(10))
def test_a_single_impossible_value_is_found_by_the_audit_and_named(tmp_path, shard_format, row):
    teacher_cache(tmp_path, spec_of(), shard_format)
    keys = CacheReader(tmp_path).plan.keys_of(1)

    def change(shard: ColumnShard) -> None:
        first, stop = shard.offsets["attention"]["codes"][row : row + 2]
        shard.parts["attention"]["codes"][stop - 3 * PER_IMAGE if stop - first > 3 * PER_IMAGE else first : stop] = 255
        scales = shard.offsets["attention"]["scales"][row : row + 2]
        shard.parts["attention"]["scales"][scales[0] : scales[1]] = 1

    if not CacheReader(tmp_path).row(keys[row]).values["attention"].size:
        pytest.skip("a row without an image")
    forge(tmp_path, change)
    (problem,) = verify(tmp_path).problems
    assert f"row {keys[row]}" in str(problem)


def test_other_caches_promise_only_finite_numbers(tmp_path, shard_format):
    """Names say something only in a cache whose fingerprint describes a teacher's targets."""
    storage = full_cache(tmp_path, shard_format=shard_format)
    assert verify(tmp_path).problems == []
    forge(tmp_path, set_all("attention", "scales", np.nan))
    (problem,) = verify(tmp_path).problems
    assert "field 'attention': scales: found nan, expected a scale of 0 or more" in str(problem)
    assert storage.size(problem.objects[1])


@pytest.mark.parametrize(
    "field",
    [
        FieldSpec("attention", ("H", "T"), "float32", "sqrt8"),
        FieldSpec("topk_rank_steps", ("A", "K"), "int64", "exact"),
        FieldSpec("tail_logmass", ("A",), "float32", "int8-rows"),
        FieldSpec("labels", ("L",), "int32", "exact", per_image=True),
    ],
    ids=lambda field: field.name,
)
def test_a_field_in_a_form_that_no_teacher_writes_is_refused(tmp_path, field):
    whole = spec_of()
    spec = CacheSpec(tuple(field if other.name == field.name else other for other in whole.fields), whole.fingerprint)
    store = teacher_cache(tmp_path / "whole", whole, "zarr", rows=2)
    manifest = replace(store.manifest, spec=spec)
    overwrite(store.storage, "cache.json", manifest.to_json().encode())
    for deed in (CacheReader, verify):
        with pytest.raises(CacheError, match=rf"field '{field.name}' is .*where a teacher's cache has"):
            deed(store.url)


def test_a_reader_with_checks_goes_to_another_process(tmp_path, shard_format):
    teacher_cache(tmp_path, spec_of(), shard_format)
    reader = CacheReader(tmp_path)
    assert len(list(reader.rows(reader))) == 20
    copy = pickle.loads(pickle.dumps(reader))
    assert len(list(copy.rows(copy))) == 20


def test_a_shard_is_checked_once_however_often_it_is_opened(tmp_path, shard_format, monkeypatch):
    teacher_cache(tmp_path, spec_of(), shard_format)
    reader, calls = CacheReader(tmp_path, max_shards=1), []
    real = ranges._finite
    checks = reader._checks.of_field["sketch"]
    monkeypatch.setitem(reader._checks.of_field, "sketch", [lambda values: (calls.append(1), real(values))[1], *checks[1:]])
    names = [field.name for field in reader.spec.fields]
    checked = []
    for _ in range(3):
        for key in reader:
            reader.encoded_fields(key, names)
        checked.append(len(calls))
    assert checked[0] > 0
    assert checked == checked[:1] * 3


def test_the_levels_of_log_probabilities_are_those_of_the_encoder():
    assert (ranges.LEVELS_PER_E, ranges.FINE, ranges.LOWEST_CODE) == (
        logit_levels.LEVELS_PER_E,
        logit_levels.FINE,
        logit_levels.LOWEST_CODE,
    )
