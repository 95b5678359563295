"""A cache belongs to one teacher, one preparation and one choice of targets: any other setting is refused."""

from __future__ import annotations

import pytest
from tiny_runs import SAMPLES, TEACHER, copy_checkpoint, record, with_file, with_other_weights, write_cache, write_data

from alignkd.cache_store.errors import FingerprintMismatchError
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.pipeline.config.targets import TargetSettings
from alignkd.targets.logits import LogitSettings

PREPROCESSOR = "clip/preprocessor_config.json"
OTHER_DATA = [*SAMPLES[:5], record("new", None, "a", "b")]


def teacher(change):
    return lambda folder: {"teacher": str(change(folder / "other"))}


def data(records):
    """Indented, so that the file has another size: one of the same size is compared sample by sample, when they are read."""
    return lambda folder: {"data": str(write_data(folder / "other.json", records, indent=1))}


def given(**changes):
    return lambda folder: changes


def targets(**changes):
    return given(settings=TargetSettings(**changes))


def logits(**changes):
    return targets(logits=LogitSettings(**changes))


CHANGES = {
    "weights": (teacher(lambda t: with_other_weights(TEACHER, t)), ['fingerprint.teacher.weights: cache has "']),
    "heads": (
        teacher(lambda t: copy_checkpoint(TEACHER, t, num_attention_heads=4, num_key_value_heads=4)),
        ["fingerprint.teacher.heads: cache has 8, wanted 4"],
    ),
    "dtype": (given(dtype="bfloat16"), ['fingerprint.teacher.dtype: cache has "float32", wanted "bfloat16"']),
    "tokenizer": (
        teacher(lambda t: with_file(TEACHER, t, "tokenizer_config.json", legacy=False)),
        ['fingerprint.tokenizer: cache has "'],
    ),
    "template": (given(template="plain"), ['fingerprint.template: cache has "v1", wanted "plain"']),
    "image preprocessing": (
        teacher(lambda t: with_file(TEACHER, t, PREPROCESSOR, image_mean=[0.5, 0.5, 0.5])),
        ['fingerprint.image_preprocessing: cache has "'],
    ),
    "aspect ratio": (
        teacher(lambda t: copy_checkpoint(TEACHER, t, image_aspect_ratio=None)),
        ['fingerprint.image_preprocessing: cache has "'],
    ),
    "vision tokens": (
        teacher(lambda t: copy_checkpoint(TEACHER, t, mm_projector_grid=6)),
        ["fingerprint.vision_tokens_per_image: cache has 144, wanted 36"],
    ),
    "maximum length": (given(max_length=99), ["fingerprint.max_length: cache has 2048, wanted 99"]),
    "fewer targets": (
        targets(targets=("vision",)),
        ['fingerprint.targets.attention: cache has "per-head", wanted null', "field.attention.codec: cache has"],
    ),
    "no vision": (targets(targets=("attention", "logits")), ["fingerprint.targets.vision: cache has true, wanted false"]),
    "logit kind": (logits(kind="topk"), ['fingerprint.targets.logits.kind: cache has "sketch", wanted "topk"']),
    "top-k": (logits(top_k=5), ["fingerprint.targets.logits.top_k: cache has 16, wanted 5"]),
    "sketch": (logits(sketch_bytes=5), ["fingerprint.targets.logits.sketch_bytes: cache has 64, wanted 5"]),
    "temperature": (logits(temperature=2.0), ["fingerprint.targets.logits.temperature: cache has 1.0, wanted 2.0"]),
    "attention kind": (targets(attention="mean"), ['targets.attention: cache has "per-head", wanted "mean"']),
    "attention codec": (
        targets(attention_codec="int8-rows"),
        ['field.attention.codec: cache has "sqrt8", wanted "int8-rows"'],
    ),
    "vision codec": (targets(vision_codec="exact"), ['field.vision_tokens.codec: cache has "int8-rows", wanted "exact"']),
    "alignment": (
        given(alignment="slice"),
        ['fingerprint.alignment: cache has "targets", wanted "slice"', "field.attention.codec: cache has"],
    ),
    "other samples": (data(OTHER_DATA), ['fingerprint.data: cache has "']),
    "other order": (data(SAMPLES[::-1]), ['fingerprint.data: cache has "']),
    "fewer samples": (data(SAMPLES[:5]), ['fingerprint.data: cache has "']),
    "shard samples": (given(shard_samples=3), ["plan.shard_samples: cache has 2, wanted 3"]),
    "format": (given(shard_format="webdataset"), ['format: cache has "zarr", wanted "webdataset"']),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_cache_of_another_setting_is_refused_with_both_values_and_the_way_out(tmp_path, data, cache, name):
    change, parts = CHANGES[name]
    before = sorted((path, path.stat().st_mtime_ns) for path in cache.rglob("*"))
    changes = change(tmp_path)
    with pytest.raises(FingerprintMismatchError) as error:
        write_cache(changes.pop("data", data), cache, **changes)
    for part in [*parts, str(cache), "cache has", "wanted", "Write to another --cache, or use the settings"]:
        assert part in str(error.value)
    assert sorted((path, path.stat().st_mtime_ns) for path in cache.rglob("*")) == before


def leaves(tree, path=""):
    for name, value in tree.items():
        yield from leaves(value, f"{path}{name}.") if isinstance(value, dict) else [f"{path}{name}"]


def test_every_part_of_the_fingerprint_is_tried_above(cache):
    tried = " ".join(part for _, parts in CHANGES.values() for part in parts)
    missing = [name for name in leaves(CacheReader(cache).fingerprint) if name not in tried]
    of_weights = ["family", "image_token_id", "tokens_per_placeholder", "vocabulary", "width"]
    assert missing == [f"teacher.{name}" for name in of_weights], "these never change without the weights"
