"""The webdataset format: the shared suite, and what only an indexed tar archive can get wrong."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cache_samples import SPEC, key_of, make_rows
from shard_conformance import ShardConformance, packed

from alignkd.cache_store import webdataset_shard
from alignkd.cache_store.row import Row
from alignkd.cache_store.shard import CorruptShard
from alignkd.cache_store.spec import CacheSpec, FieldSpec

Index = dict[str, Any]


class TestWebdatasetShard(ShardConformance):
    format = webdataset_shard


def written(count: int = 4) -> bytes:
    return webdataset_shard.write_shard(packed(SPEC, make_rows(count)))


def members_of(data: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [(member, archive.extractfile(member).read()) for member in archive]


def member(member_name: str, content: bytes, **header: Any) -> bytes:
    info = tarfile.TarInfo(member_name)
    info.size = len(content)
    for attribute, value in header.items():
        setattr(info, attribute, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def with_index_text(text: bytes) -> bytes:
    """A valid shard with another index; what follows it stays."""
    data = written()
    old = len(members_of(data)[0][1])
    return member("__index__", text) + data[512 + old + -old % 512 :]


def with_index(change: Callable[[Index], object]) -> bytes:
    index = json.loads(members_of(written())[0][1])
    change(index)
    return with_index_text(json.dumps(index, sort_keys=True, separators=(",", ":")).encode())


def set_part(field: str, part: str, row: int, offset: int | None = None, size: int | None = None) -> Callable[[Index], None]:
    def change(index: Index) -> None:
        place = index["fields"][field]["parts"][part]["places"][row]
        place[:] = [place[0] if offset is None else offset, place[1] if size is None else size]

    return change


def set_shapes(field: str, shapes: Any) -> Callable[[Index], None]:
    return lambda index: index["fields"][field].update(shapes=shapes)


def test_a_shard_rewritten_unchanged_is_read():
    assert len(webdataset_shard.read_shard(SPEC, with_index(dict))) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(size=index["size"] + 1),
        lambda index: index.update(size=float(index["size"])),
        lambda index: index.update(more=1),
        lambda index: index.update(ids=index["ids"][:3]),
        lambda index: index.update(ids=[["../../etc", "x", ""]] * 4),
        lambda index: index.update(ids=[index["ids"][0]] * 4),
        lambda index: index.update(fields=[]),
        lambda index: index["fields"].pop("mass"),
        lambda index: index["fields"]["mass"].pop("parts"),
        lambda index: index["fields"]["mass"].update(dtype="float64"),
        lambda index: index["fields"]["mass"]["parts"]["values"].update(dtype="|O"),
        set_shapes("token_ids", [[-1]] * 4),
        set_shapes("token_ids", [[1.5]] * 4),
        set_shapes("token_ids", [[True]] * 4),
        set_shapes("token_ids", [["1"]] * 4),
        set_shapes("token_ids", [[1, 1]] * 4),
        set_shapes("token_ids", [[1 << 31]] * 4),
        set_shapes("token_ids", [[(1 << 31) - 1]] * 4),
        set_shapes("attention", [[(1 << 31) - 1] * 3] * 4),
        set_shapes("vision", [[0, 4], [5, 4], [5, 3], [0, 4]]),
        set_part("vision", "values", 2, size=0),
        lambda index: set_part("vision", "values", 2, index["fields"]["vision"]["parts"]["values"]["places"][0][0])(index),
        set_part("mass", "values", 0, offset=-1),
        set_part("mass", "values", 0, size=-1),
        set_part("mass", "values", 0, offset=1 << 40),
        set_part("mass", "values", 0, size=1 << 63),
        set_part("mass", "values", 0, offset=(1 << 63) - 1, size=(1 << 63) - 1),
        set_part("mass", "values", 0, offset=0.5),
    ],
)
def test_an_index_that_lies_is_refused(change):
    with pytest.raises(CorruptShard):
        webdataset_shard.read_shard(SPEC, with_index(change))


@pytest.mark.parametrize("text", [b"", b"[" * 100_000, b"1" * 5000, b"{}", b"[]", b"\xff"])
def test_an_index_that_is_none_is_refused(text):
    with pytest.raises(CorruptShard):
        webdataset_shard.read_shard(SPEC, with_index_text(text))


def test_an_index_that_says_something_twice_is_refused():
    text = members_of(written())[0][1]
    with pytest.raises(CorruptShard, match="twice"):
        webdataset_shard.read_shard(SPEC, with_index_text(text.replace(b'"size":', b'"size":1,"size":')))


@pytest.mark.parametrize("header", [{"name": "index"}, {"type": tarfile.SYMTYPE}, {"size": -512}, {"size": 1 << 40}])
def test_an_archive_that_does_not_begin_with_an_index_is_refused(header):
    with pytest.raises(CorruptShard, match="expected '__index__'"):
        webdataset_shard.read_shard(SPEC, member("__index__", b"{}", **header) + bytes(1024))


@pytest.mark.parametrize(
    "change",
    [
        set_part("mass", "values", 1, size=0),
        set_part("mass", "values", 1, size=15),
        set_part("mass", "values", 1, size=19),
        set_part("mass", "values", 1, offset=0),
        set_shapes("attention", [[2, 9, 5]] * 4),
    ],
)
def test_a_row_that_is_not_where_the_index_says_is_refused_when_it_is_read(change):
    shard = webdataset_shard.read_shard(SPEC, with_index(change))
    with pytest.raises(CorruptShard, match=f"row {key_of(1)}, field '(mass|attention)'"):
        shard.row(1)


def test_a_decompression_bomb_is_refused_before_it_is_decompressed():
    data = bytearray(written())
    shard = webdataset_shard.read_shard(SPEC, bytes(data))
    at = shard.base + shard.columns["attention", "codes"].places[1][0]
    data[at + 4 : at + 8] = (1 << 31).to_bytes(4, "little")
    with pytest.raises(CorruptShard, match="a Blosc frame declares"):
        webdataset_shard.read_shard(SPEC, bytes(data)).row(1)


def audited(change: Callable[[list[tuple[str, bytes]]], object], rows: int = 2, **header: Any) -> None:
    """Audit a shard whose members after the index were changed, but not the index."""
    data = written(rows)
    index, *rest = [(info.name, content) for info, content in members_of(data)]
    change(rest)
    body = b"".join(member(name, content, **header) for name, content in rest) + bytes(1024)
    size = json.loads(index[1])["size"]
    changed = member(*index) + body.ljust(size, b"\0")[:size]
    webdataset_shard.audit(changed, webdataset_shard.read_shard(SPEC, changed))


def test_an_audit_of_the_archive_as_written_finds_nothing():
    audited(list)


@pytest.mark.parametrize(
    "change",
    [
        lambda rest: rest.pop(),
        lambda rest: rest.insert(3, rest[3]),
        lambda rest: rest.append(("more", b"")),
        lambda rest: rest.reverse(),
        lambda rest: rest.__setitem__(0, (rest[0][0], rest[0][1].replace(b"sample-0", b"sample-1"))),
        lambda rest: rest.__setitem__(1, (rest[2][0], rest[1][1])),
    ],
)
def test_an_audit_finds_members_that_are_not_what_the_index_says(change):
    with pytest.raises(CorruptShard):
        audited(change)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE])
def test_an_audit_finds_members_that_are_no_plain_files(kind):
    with pytest.raises(CorruptShard):
        audited(list, type=kind)


def test_an_audit_finds_rows_that_share_a_value_without_an_image():
    data = with_index(lambda index: index["ids"][2].__setitem__(2, "f" * 64))
    with pytest.raises(CorruptShard, match="expected just the"):
        webdataset_shard.audit(data, webdataset_shard.read_shard(SPEC, data))


def test_headers_know_no_time_and_no_user():
    for info, _ in members_of(written()):
        assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)
        assert not info.pax_headers


def test_names_longer_than_a_header_holds_come_back():
    spec = CacheSpec((FieldSpec("x" * 64, ("N",), "int64", "exact"),), {})
    data = webdataset_shard.write_shard(packed(spec, [Row(key_of(0), "", "", {"x" * 64: np.arange(5)})]))
    shard = webdataset_shard.read_shard(spec, data)
    webdataset_shard.audit(data, shard)
    assert shard.row(0).values["x" * 64].tolist() == [0, 1, 2, 3, 4]


def test_only_the_first_row_of_an_image_has_its_members_and_the_others_say_so():
    members = {info.name: content for info, content in members_of(written())}
    named = [name.split(".")[0] for name in members if name.endswith(".vision.values.blosc")]
    assert named == [key_of(0), key_of(1), key_of(3)]
    described = {i: json.loads(members[f"{key_of(i)}.json"])["fields"] for i in range(4)}
    assert {i: fields["vision"].get("same_as") for i, fields in described.items()} == {0: None, 1: None, 2: key_of(1), 3: None}
    assert not [fields for fields in described.values() if "same_as" in fields["attention"]]


@pytest.mark.parametrize("other", [key_of(0), key_of(9)])
def test_an_audit_finds_a_row_that_names_another_than_the_first_of_its_image(other):
    def change(rest: list[tuple[str, bytes]]) -> None:
        (at,) = (i for i, (_, content) in enumerate(rest) if b"same_as" in content)
        rest[at] = (rest[at][0], rest[at][1].replace(key_of(1).encode(), other.encode()))

    with pytest.raises(CorruptShard, match=r"\.json is not what the index says"):
        audited(change, rows=4)
