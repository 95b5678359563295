"""``cache.json``: what a cache holds, in which shard format, after which plan, with which tensors kept once.

A cache exists when this file does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignkd.cache_store.formats.registry import get_format
from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.tensors import TensorEntry
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec
from alignkd.cache_store.storage.contract import Storage

NAME = "cache.json"
FORMAT_VERSION = 3


@dataclass(frozen=True)
class Manifest:
    """The spec of every row, the shard format by name, the summary of the plan (``Plan.summary``), and tensors by name."""

    spec: CacheSpec
    shard_format: str
    plan: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)

    def to_json(self) -> str:
        """Readable JSON, keys sorted, with its own checksum: equal manifests are equal bytes."""
        content = {
            "format_version": FORMAT_VERSION,
            "shard_format": self.shard_format,
            **self.spec.to_dict(),
            "plan": self.plan,
            "tensors": {name: entry.to_dict() for name, entry in self.tensors.items()},
        }
        return json.dumps({**content, "sha256": _checksum(content)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest of ``to_json``; ValueError for another version, and where a single character differs."""
        try:
            content = json.loads(text)
            version = content["format_version"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"not the description of a cache: {error!r}") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"found cache format {version!r}, expected {FORMAT_VERSION}: "
                "read it with the alignkd that wrote it, or write a new cache"
            )
        try:
            checksum = content.pop("sha256")
            if checksum != _checksum(content):
                raise ValueError("its checksum does not match: the file is damaged")
            fields = tuple(FieldSpec(**entry) for entry in content["fields"])
            get_format(content["shard_format"])
            tensors = {name: TensorEntry(name, **entry) for name, entry in content["tensors"].items()}
            manifest = cls(CacheSpec(fields, content["fingerprint"]), content["shard_format"], content["plan"], tensors)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not the description of a cache: {error!r}") from error
        if manifest.to_json() != text:
            raise ValueError("it is not what it was written as: the file is damaged")
        return manifest

    def load_plan(self, storage: Storage) -> Plan:
        """The plan; ValueError where it is missing or damaged."""
        return Plan.load(storage, self.plan)


def read_manifest(storage: Storage) -> Manifest:
    """What ``cache.json`` says; ValueError where there is none, and where it is damaged."""
    try:
        data = storage.read(NAME)
    except FileNotFoundError as error:
        raise ValueError(f"no cache at {storage.url}: {_found(storage)}, expected {NAME}; run alignkd cache-teacher") from error
    try:
        return Manifest.from_json(data.decode())
    except ValueError as error:
        raise ValueError(f"{storage.url}/{NAME}: {error}. Restore it from a copy, or write a new cache") from error


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _found(storage: Storage) -> str:
    names = storage.names("")
    return f"found {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "found nothing"
