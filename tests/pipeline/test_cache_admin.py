"""Commands that look after a cache: they load no torch, and read a fingerprint that others may have written."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import open_store
from alignkd.cache_store.rows.row import Rejected
from alignkd.errors import CacheError, DataError
from alignkd.pipeline.cache_admin.row import find_row, plot_row, row_arrays
from alignkd.pipeline.cache_admin.status import status_figures
from alignkd.pipeline.config.fingerprint_keys import check_fingerprint_keys
from alignkd.targets.logit_levels import LOWEST_CODE, decode_kept
from alignkd.targets.logits import LogitSettings
from alignkd.targets.logits.topk import TopK

IMPORTS = """
import json, sys
from alignkd.cache_store.protocol.store import open_store
from alignkd.pipeline.cache_admin import audit, row, status
figures = status.status_figures(open_store(sys.argv[1]))
"""
READS_ROWS = """
from alignkd.cache_store.protocol.reader import CacheReader
reader = CacheReader(sys.argv[1])
audit.verify_with_progress(sys.argv[1], quick=True)
row.row_figures(reader, row.find_row(reader, "cap0"))
"""
PRINTS = "print(json.dumps([figures['samples_done'], list(sys.modules)]))"


@pytest.mark.parametrize(
    ("work", "unwanted"),
    [
        ("", {"torch", "transformers", "matplotlib", "PIL", "zarr", "fsspec"}),
        (READS_ROWS, {"torch", "transformers", "matplotlib", "PIL"}),  # zarr reads shards of its format
    ],
    ids=["status", "verify and inspect"],
)
def test_looking_after_a_local_cache_loads_no_torch_and_nothing_else_that_is_slow_and_not_needed(cache, work, unwanted):
    command = [sys.executable, "-c", IMPORTS + work + PRINTS, str(cache)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    samples, modules = json.loads(finished.stdout)
    assert (samples, unwanted & set(modules)) == (6, set())


@st.composite
def stored_answers(draw):
    """Ranks, codes and tail masses of a few answers, and the ids by rank, as a cache may hold them."""
    vocabulary, answers = draw(st.integers(2, 70_000)), draw(st.integers(0, 4))
    kept = draw(st.integers(1, min(vocabulary, 20)))
    seed = np.random.default_rng(draw(st.integers(0, 2**32)))
    ranks_AK = np.zeros((answers, kept), np.int64)
    for answer in range(answers):
        ranks_AK[answer] = np.sort(seed.choice(vocabulary, kept, replace=False))
    steps_AK = np.diff(ranks_AK, axis=1, prepend=0).astype("uint16" if vocabulary <= 2**16 else "uint32")
    codes_AK = seed.integers(0, LOWEST_CODE + 1, (answers, kept)).astype(np.uint8)
    tail_A = np.array(draw(st.lists(st.floats(-100, 0, width=16), min_size=answers, max_size=answers)), np.float32)
    return steps_AK, codes_AK, tail_A, seed.permutation(vocabulary).astype(np.int32)


@settings(max_examples=200)
@given(stored_answers())
def test_kept_tokens_decode_without_torch_as_the_codec_decodes_them(stored):
    steps_AK, codes_AK, tail_A, id_of_rank_N = stored
    found = decode_kept(steps_AK, codes_AK, tail_A, id_of_rank_N)
    codec = TopK(LogitSettings("topk"), {"id_of_rank": torch.from_numpy(id_of_rank_N)})
    values = {
        "topk_rank_steps": torch.from_numpy(steps_AK.astype(np.int64)),
        "topk_logprob_codes": torch.from_numpy(codes_AK),
        "tail_logmass": torch.from_numpy(tail_A),
    }
    ids_AK, logprobs_AK, left_A = (tensor.numpy() for tensor in codec.kept(values))
    np.testing.assert_array_equal(found[0], ids_AK)
    assert [array.dtype for array in found] == [np.int64, np.float32, np.float32]
    # Two libraries add in another order, with the 24 bits of float32.
    np.testing.assert_allclose(found[1], logprobs_AK, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[2], left_A, rtol=1e-5, atol=1e-5)


def changed(fingerprint, key, value):
    """A copy with one key changed; with none where ``value`` is ``...``."""
    copy = json.loads(json.dumps(fingerprint))
    *path, name = key.split(".")
    parent = copy
    for part in path:
        parent = parent[part]
    if value is ...:
        del parent[name]
    else:
        parent[name] = value
    return copy


WRONG = [
    ("teacher", ..., "nothing as teacher, expected a mapping"),
    ("teacher", ["llama"], "expected a mapping"),
    ("teacher.width", "64", "'64' as teacher.width, expected a positive integer"),
    ("teacher.vocabulary", True, "True as teacher.vocabulary, expected a positive integer"),
    ("teacher.vocabulary", 0, "expected a positive integer"),
    ("targets", None, "None as targets, expected a mapping"),
    ("targets.logits", ..., "nothing as targets.logits, expected a mapping or null"),
    ("targets.logits", "topk", "expected a mapping or null"),
    ("targets.logits.top_k", "16", "expected a positive integer"),
]


@pytest.mark.parametrize(("key", "value", "words"), WRONG)
def test_a_cache_that_does_not_describe_its_targets_is_refused_by_status(cache, key, value, words):
    store = open_store(cache)
    spec = dataclasses.replace(store.spec, fingerprint=changed(store.spec.fingerprint, key, value))
    other = dataclasses.replace(store, manifest=dataclasses.replace(store.manifest, spec=spec))
    with pytest.raises(CacheError, match="does not describe its targets") as error:
        status_figures(other)
    assert words in str(error.value)
    assert str(cache) in str(error.value)


def test_keys_that_this_version_does_not_know_are_allowed(cache):
    check_fingerprint_keys({**CacheReader(cache).fingerprint, "new": 1})


@pytest.mark.parametrize(("key", "value"), [("targets.logits", ...), ("targets.logits.kind", 3), ("targets.logits.kind", ...)])
def test_a_row_of_a_cache_that_does_not_describe_its_targets_is_refused(cache, key, value):
    reader = CacheReader(cache)
    row = find_row(reader, "cap0")
    reader.spec = dataclasses.replace(reader.spec, fingerprint=changed(reader.fingerprint, key, value))
    with pytest.raises(CacheError, match=r"does not describe its targets|cannot be decoded.*KeyError: 'kind'"):
        row_arrays(reader, row)


def test_a_row_whose_ranks_are_beyond_the_vocabulary_is_refused(cache):
    reader = CacheReader(cache)
    row = find_row(reader, "cap0")
    steps = np.full_like(row.values["topk_rank_steps"], 60_000)
    other = dataclasses.replace(row, values={**row.values, "topk_rank_steps": steps})
    with pytest.raises(CacheError, match=r"row of 'cap0' cannot be decoded: run alignkd cache verify .* \(IndexError"):
        row_arrays(reader, other)


def test_a_rejected_sample_has_no_row_and_the_reason_is_given(tmp_path, cache):
    shutil.copytree(cache, tmp_path / "cache")
    reader = CacheReader(tmp_path / "cache")
    row = find_row(reader, "cap0")
    reader.rejected = {row.key: Rejected(row.key, "x", "no image")}
    with pytest.raises(DataError, match="has no row of sample 'x'; it was rejected: no image"):
        find_row(reader, "x")


def test_a_row_without_regions_is_not_plotted(cache, tmp_path):
    reader = CacheReader(cache)
    row = find_row(reader, "cap0")
    other = dataclasses.replace(row, values={name: value for name, value in row.values.items() if name != "regions"})
    with pytest.raises(CacheError, match="does not say where its vision tokens lie"):
        plot_row(reader, other, str(tmp_path / "x.png"))
