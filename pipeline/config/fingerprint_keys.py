"""Check the parts of a cache's fingerprint that jobs read: others may have written the ``cache.json`` they come from."""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from alignkd.errors import CacheError


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_date(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(datetime.fromisoformat(value))
    except ValueError:
        return False


_KINDS: dict[str, Callable[[Any], bool]] = {
    "a mapping": lambda value: isinstance(value, Mapping),
    "a mapping or null": lambda value: value is None or isinstance(value, Mapping),
    "text": lambda value: isinstance(value, str),
    "a date": _is_date,
    "text or null": lambda value: value is None or isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "an integer": lambda value: type(value) is int,
    "a positive integer": _is_count,
    "a positive integer or null": lambda value: value is None or _is_count(value),
    "a number or null": lambda value: value is None or type(value) in (int, float),
    "a list of layers": lambda value: isinstance(value, list) and all(type(layer) is int and layer >= 0 for layer in value),
}

_REQUIRED = {
    "teacher": "a mapping",
    "teacher.vocabulary": "a positive integer",
    "teacher.heads": "a positive integer",
    "teacher.width": "a positive integer",
    "tokenizer": "text",
    "template": "text",
    "max_length": "a positive integer",
    "targets": "a mapping",
    "targets.attention": "text or null",
    "targets.vision": "true or false",
    "targets.logits": "a mapping or null",
}
_OPTIONAL = {
    "teacher.family": "text",
    "teacher.dtype": "text",
    "teacher.image_token_id": "an integer",
    "teacher.tokens_per_placeholder": "a positive integer",
    "teacher.no_place": "text",
    "chat_template": "text",
    "encoder": "a positive integer",
    "prompt_date": "a date",
    "image_preprocessing": "text",
    "vision_tokens_per_image": "a positive integer or null",
    "alignment": "text",
    "tokenizer_first_ids": "text",
    "targets.advantage": "text",
    "targets.attention_layers": "a mapping",
    "targets.attention_layers.held": "a list of layers",
    "targets.attention_layers.of": "a positive integer",
    "targets.logits.kind": "text",
    "targets.logits.top_k": "a positive integer",
    "targets.logits.draws": "a positive integer",
    "targets.logits.sketch_bytes": "a positive integer",
    "targets.logits.hidden_bits": "a positive integer",
    "targets.logits.temperature": "a number or null",
    "targets.logits.vocabulary": "a positive integer",
}
_ABSENT = object()


def check_fingerprint_keys(fingerprint: Mapping[str, Any], *parts: str, cache: str = "") -> None:
    """Refuse a fingerprint that does not describe its targets.

    ``parts``: keys such as ``targets.logits``, which are checked with all below them and must be there; without any, all that
    jobs read is checked. Unknown keys are allowed: later versions may add some. ``cache``: its URL, for the message.

    Raises:
        CacheError: names a key that is missing or of another type, what was found, and what to do.
    """
    for key, kind in {**_REQUIRED, **_OPTIONAL}.items():
        if parts and not any(key == part or key.startswith(f"{part}.") for part in parts):
            continue
        value = _find(fingerprint, key)
        if value is _ABSENT and key not in _REQUIRED and key not in parts:
            continue
        if value is _ABSENT or not _KINDS[kind](value):
            found = "nothing" if value is _ABSENT else repr(value)[:80]
            raise CacheError(
                f"the cache{f' at {cache}' if cache else ''} does not describe its targets: its fingerprint has {found} as"
                f" {key}, expected {kind}. cache.json is damaged, or another program wrote it: restore it from a copy, or"
                " write another cache with alignkd cache-teacher"
            )


def _find(fingerprint: Mapping[str, Any], key: str) -> Any:
    value: Any = fingerprint
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return _ABSENT
        value = value[name]
    return value
