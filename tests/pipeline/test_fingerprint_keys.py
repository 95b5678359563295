"""A fingerprint that does not describe its cache's targets is one message, wherever stage two reads it."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.errors import CacheError
from alignkd.losses.recipes import get_recipe
from alignkd.pipeline.cache_io.compatibility import check_attention_layers, check_recipe_targets, check_student_compatible
from alignkd.pipeline.cache_io.cross_model import CrossModelMap
from alignkd.pipeline.cache_io.logits import open_codec, settings_of
from alignkd.pipeline.cache_io.teacher_slice import open_slice
from alignkd.targets.cross_model import CrossModelError

RECIPE = get_recipe("align-kd", None)

READERS = {
    "student": lambda student, found: check_student_compatible(student, found, "v1", 2048, "cache"),
    "recipe": lambda student, found: check_recipe_targets(found, RECIPE),
    "layers": lambda student, found: check_attention_layers(student, found, RECIPE),
    "logits": lambda student, found: settings_of(found),
    "map": lambda student, found: CrossModelMap.of(student, found),
    "slice": lambda student, found: open_slice(
        SimpleNamespace(fingerprint={**found, "alignment": "slice"}, url="here"), student, RECIPE.needs, features_only=False
    ),
}

CASES = [
    ("student", "teacher", ...),
    ("student", "teacher.vocabulary", "512"),
    ("student", "teacher.family", 3),
    ("student", "template", ...),
    ("student", "max_length", None),
    ("student", "tokenizer", ["x"]),
    ("student", "vision_tokens_per_image", "144"),
    ("student", "targets.logits.vocabulary", "512"),
    ("recipe", "targets", ...),
    ("recipe", "targets.vision", "yes"),
    ("recipe", "targets.attention", ...),
    ("recipe", "targets.logits", [1]),
    ("recipe", "targets.logits.temperature", "1"),
    ("layers", "targets.attention_layers", 3),
    ("layers", "targets.attention_layers", {"held": "all", "of": 3}),
    ("layers", "targets.attention_layers", {"held": [0], "of": "3"}),
    ("logits", "targets", ...),
    ("logits", "targets.logits", None),
    ("logits", "targets.logits.kind", "dense"),
    ("logits", "targets.logits.kind", 3),
    ("logits", "targets.logits.top_k", "16"),
    ("logits", "targets.logits.new", 1),
    ("map", "teacher", ...),
    ("map", "teacher.image_token_id", ...),
    ("map", "teacher.tokens_per_placeholder", "1"),
    ("slice", "teacher.width", ...),
    ("slice", "teacher.dtype", "int7"),
    ("slice", "teacher.dtype", ...),
    ("slice", "slice", {"text": 3}),
]


@pytest.mark.parametrize(("reader", "key", "value"), CASES)
def test_a_key_that_is_missing_or_of_another_type_is_named(cache, student_vlm, reader, key, value):
    fingerprint = json.loads(json.dumps(CacheReader(cache).fingerprint))
    *path, name = key.split(".")
    parent = fingerprint
    for part in path:
        parent = parent[part]
    if value is ...:
        del parent[name]
    else:
        parent[name] = value
    with pytest.raises(CacheError, match=r"does not describe its (targets|slice)") as error:
        READERS[reader](student_vlm, fingerprint)
    assert "write another" in str(error.value)


def test_a_cache_without_the_tensors_of_its_logits_is_refused(cache):
    settings = settings_of(CacheReader(cache).fingerprint)
    with pytest.raises(CacheError, match=r"kind 'sketch' but lacks the tensors logits\.id_of_rank, "):
        open_codec(settings, {}, "cpu")


def test_a_row_without_its_token_ids_cannot_be_mapped(cache, student_vlm):
    reader = CacheReader(cache)
    row = reader.row(next(iter(reader)), {"spans", "regions"})
    with pytest.raises(CrossModelError, match="the row lacks input_ids, labels"):
        CrossModelMap.of(student_vlm, reader.fingerprint)(row, SimpleNamespace(), {})


def test_a_row_whose_spans_do_not_cover_its_token_ids_cannot_be_mapped(cache, student_vlm):
    reader = CacheReader(cache)
    row = reader.row(next(iter(reader)))
    short = dataclasses.replace(row, values={**row.values, "spans": np.zeros((0, 2), np.int32)})
    with pytest.raises(CrossModelError, match=r"for 0 of \d+ token ids which characters they cover"):
        CrossModelMap.of(student_vlm, reader.fingerprint)(short, SimpleNamespace(), {})
