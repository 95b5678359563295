"""The settings that a cache was written with, under the names that stage one's options have."""

from typing import Any

from alignkd.cache_store.protocol.manifest import Manifest, read_manifest
from alignkd.cache_store.storage import open_storage
from alignkd.pipeline.config.cache_layout import ALL_TARGETS, attention_layer, is_slice
from alignkd.pipeline.config.fingerprint_keys import check_fingerprint_keys


def settings_of_cache(url: str) -> dict[str, Any]:
    """The values of the options that decide what the cache at ``url`` holds, and how.

    Raises:
        CacheError: there is no cache, or its manifest is damaged, or does not describe its targets.
        ConfigError: a URL that cannot be opened.
    """
    manifest = read_manifest(open_storage(url))
    fingerprint = dict(manifest.spec.fingerprint)
    check_fingerprint_keys(fingerprint, cache=url)
    targets = fingerprint["targets"]
    held = [name for name in ALL_TARGETS if targets.get(name)]
    found = {
        "template": fingerprint["template"],
        "max_length": fingerprint["max_length"],
        "dtype": fingerprint["teacher"].get("dtype"),
        "alignment": fingerprint.get("alignment", "targets"),
        "targets": tuple(held),
        "attention": targets["attention"],
        "attention_layers": ",".join(map(str, targets.get("attention_layers", {}).get("held", []))) or None,
        "shard_format": manifest.shard_format,
        "shard_samples": manifest.plan["shard_samples"],
        **_codecs(manifest),
        **(targets["logits"] or {}),
        **_of_slice(fingerprint),
    }
    return {name: value for name, value in found.items() if value is not None}


def _codecs(manifest: Manifest) -> dict[str, str]:
    """How attention and vision tokens are stored."""
    found = {}
    for field in manifest.spec.fields:
        if attention_layer(field.name) is not None:
            found["attention_codec"] = field.codec
        if field.name == "vision_tokens":
            found["vision_codec"] = field.codec
    return found


def _of_slice(fingerprint: dict[str, Any]) -> dict[str, bool]:
    if not is_slice(fingerprint):
        return {}
    tower = fingerprint.get("slice", {}).get("tower", {})
    return {"slice_without_tower": tower.get("in_cache") is False}
