"""``cache.json``: the fields of a cache, its fingerprint, shard format, plan and tensors.

A cache exists when this file does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignkd.cache_store.errors import UnusableObjectError
from alignkd.cache_store.formats.registry import get_format
from alignkd.cache_store.limits import MAX_JSON_BYTES, load_json
from alignkd.cache_store.protocol.further_plans import load_whole
from alignkd.cache_store.protocol.plan import Plan, check_summary
from alignkd.cache_store.protocol.tensors import TensorEntry
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec
from alignkd.cache_store.storage import Storage
from alignkd.errors import AlignkdError, CacheError, wrap_errors

NAME = "cache.json"
FORMAT_VERSION = 3
GROWN_VERSION = 4
"""The format version of a cache with further plans: programs that know only the first plan must refuse it."""


@dataclass(frozen=True)
class Manifest:
    """Fields and fingerprint, the name of the shard format, the summary of the first plan (``Plan.summary``), tensors by name.

    ``version``: :data:`FORMAT_VERSION`, or :data:`GROWN_VERSION` from the moment when a further plan is about to be written.
    """

    spec: CacheSpec
    shard_format: str
    plan: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    @property
    def grown(self) -> bool:
        """Whether there may be further plans."""
        return self.version == GROWN_VERSION

    def to_json(self) -> str:
        """Readable JSON with its own checksum; keys are sorted, so equal manifests are equal bytes."""
        content = {
            "format_version": self.version,
            "shard_format": self.shard_format,
            **self.spec.to_dict(),
            "plan": self.plan,
            "tensors": {name: entry.to_dict() for name, entry in self.tensors.items()},
        }
        return json.dumps({**content, "sha256": _checksum(content)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest in the text of :meth:`to_json`.

        Raises:
            CacheError: another format version, not a manifest, or a single character differs from what was written.
        """
        with wrap_errors(CacheError, "not the manifest of a cache"):
            content = load_json(text.encode())
            version = content["format_version"]
            if version not in (FORMAT_VERSION, GROWN_VERSION) or isinstance(version, bool):
                raise CacheError(
                    f"found cache format {version!r}, expected {FORMAT_VERSION}"
                    f" or {GROWN_VERSION}: read it with the alignkd that wrote it, or write a new cache"
                )
            if content.pop("sha256") != _checksum(content):
                raise CacheError("its checksum does not match: the file is damaged")
            get_format(content["shard_format"])
            check_summary(content["plan"])
            fields = tuple(FieldSpec(**entry) for entry in content["fields"])
            tensors = {name: TensorEntry(name, **entry) for name, entry in content["tensors"].items()}
            spec = CacheSpec(fields, content["fingerprint"])
            manifest = cls(spec, content["shard_format"], content["plan"], tensors, version)
            if manifest.to_json() != text:
                raise CacheError("it differs from what alignkd writes: the file is damaged")
            return manifest

    def load_plan(self, storage: Storage) -> Plan:
        """The plan, with the further ones if there are any; CacheError if one is missing or damaged."""
        return load_whole(storage, self.plan) if self.grown else Plan.load(storage, self.plan)


def read_manifest(storage: Storage) -> Manifest:
    """The manifest of a cache.

    Raises:
        CacheError: there is no cache, or its manifest is damaged.
    """
    try:
        data = storage.read(NAME, MAX_JSON_BYTES)
    except UnusableObjectError as error:
        raise CacheError(f"{error}. Restore {NAME} from a copy, or write a new cache") from error
    except FileNotFoundError as error:
        raise CacheError(f"no cache at {storage.url}: {_found(storage)}, expected {NAME}; run alignkd cache-teacher") from error
    try:
        return Manifest.from_json(data.decode())
    except (AlignkdError, UnicodeDecodeError) as error:
        raise CacheError(f"{storage.url}/{NAME}: {error}. Restore it from a copy, or write a new cache") from error


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _found(storage: Storage) -> str:
    names = storage.names("")
    return f"found {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "found nothing"
