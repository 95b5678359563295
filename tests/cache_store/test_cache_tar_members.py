"""A tar shard with members that were made to harm: nothing is extracted, no member is followed, and the audit refuses it."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from dataclasses import replace

import pytest
from cache_samples import full_cache, overwrite

from alignkd.cache_store.errors import CorruptShardError
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.names import object_name, record_name
from alignkd.cache_store.protocol.reader import CacheReader


def member(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **fields) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


HOSTILE = {
    "a path upwards": member("../../escaped", content=b"x"),
    "an absolute path": member("/tmp/escaped-by-a-shard", content=b"x"),
    "a symbolic link": member("link", tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": member("hard", tarfile.LNKTYPE, linkname="__index__"),
    "a device": member("zero", tarfile.CHRTYPE, devmajor=1, devminor=5),
    "a pipe": member("pipe", tarfile.FIFOTYPE),
    "a folder": member("folder", tarfile.DIRTYPE),
    "a set-user-id program": member("program", content=b"#!/bin/sh\n", mode=0o4755),
    "a member of a terabyte": member("large", size=1 << 40),
    "a sparse member": member("sparse", tarfile.GNUTYPE_SPARSE, content=bytes(512)),
    "a long name": member("././@LongLink", tarfile.GNUTYPE_LONGNAME, content=b"n" * 4000),
    "a pax header": member("./PaxHeaders/x", tarfile.XHDTYPE, content=b"30 size=99999999999999999999\n\n"),
    "a global header": member("pax_global_header", tarfile.XGLTYPE, content=b"19 comment=evil....\n"),
    "a second index": member("__index__", content=b"{}"),
    "a name with escapes": member("\x1b[2Jowned", content=b"x"),
}


def members_of(data: bytes) -> int:
    """Where the first member after the index begins."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.next()
        second = archive.next()
        assert second is not None
        return second.offset


def put(url, data: bytes) -> None:
    """The first shard with other bytes, and a record that fits them."""
    reader = CacheReader(url)
    record, name = reader.records[0], object_name(0, data, ".tar")
    reader.storage.delete(record.object)
    reader.storage.write(name, data)
    digests = {"crc32": zlib.crc32(data), "sha256": hashlib.sha256(data).hexdigest()}
    overwrite(reader.storage, record_name(0), replace(record, object=name, bytes=len(data), **digests).to_json().encode())


@pytest.mark.parametrize("place", ["first", "before the rows", "last"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_member_is_found_and_does_nothing(tmp_path, monkeypatch, name, place):
    full_cache(tmp_path / "cache")
    reader = CacheReader(tmp_path / "cache")
    data = reader.storage.read(reader.records[0].object)
    at = {"first": 0, "before the rows": members_of(data), "last": len(data) - 1024}[place]
    put(tmp_path / "cache", data[:at] + HOSTILE[name] + data[at:])
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    (problem,) = verify(tmp_path / "cache").problems
    assert str(problem).startswith("shard 0 of the cache")
    with pytest.raises(CorruptShardError, match="shard 0 "):
        CacheReader(tmp_path / "cache").shard(0)
    assert sorted(os.listdir(tmp_path)) == ["cache", "empty"]
    assert os.listdir(empty) == []
    assert not os.path.exists("/tmp/escaped-by-a-shard")


def test_members_that_take_the_place_of_others_are_found_by_the_audit(tmp_path):
    """The bytes are as many as before, so that only the audit compares what lies between the frames."""
    full_cache(tmp_path)
    reader = CacheReader(tmp_path)
    data = bytearray(reader.storage.read(reader.records[0].object))
    at = members_of(bytes(data))
    data[at : at + 512] = member(
        "../../escaped", size=tarfile.TarInfo.frombuf(bytes(data[at : at + 512]), "utf-8", "strict").size
    )
    put(tmp_path, bytes(data))
    (problem,) = verify(tmp_path).problems
    assert "the archive is not what follows from its index" in str(problem)
