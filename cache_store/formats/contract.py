"""What every shard format offers."""

from __future__ import annotations

from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.rows.shard import Shard
from alignkd.cache_store.rows.spec import CacheSpec


class ShardFormat(Protocol):
    """One way to write a shard as one object; a module with these names is one."""

    NAME: str
    SUFFIX: str

    def write_shard(self, shard: Shard) -> bytes:
        """The bytes of a shard; the same rows give the same bytes."""
        ...

    def read_shard(self, spec: CacheSpec, data: bytes) -> Shard:
        """The shard in ``data``.

        Raises:
            CorruptShardError: ``data`` is not a shard, or does not match ``spec``.
        """
        ...

    def read_shapes(self, spec: CacheSpec, file: BinaryIO, rows: int, field: str) -> NDArray[np.int32]:
        """The decoded shape of ``field`` in each of the ``rows`` of a shard, ``[rows, ndim]``, from a few parts of its file.

        ``field`` is not per image. Checksums of the whole shard are not compared.

        Raises:
            CorruptShardError: ``file`` is not such a shard.
        """
        ...

    def audit(self, data: bytes, shard: Shard) -> None:
        """Check what reading ``shard`` from ``data`` did not check.

        Raises:
            CorruptShardError: something in ``data`` is not what was written.
        """
        ...

    def field_bytes(self, spec: CacheSpec, data: bytes) -> dict[str, int]:
        """Compressed bytes of each field in ``data``."""
        ...
