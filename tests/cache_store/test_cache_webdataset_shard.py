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

from alignkd.cache_store.errors import CorruptShardError
from alignkd.cache_store.formats import webdataset_shard
from alignkd.cache_store.rows.row import Row
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec

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
    return info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % 512)


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
        entry = index["fields"][field]["parts"][part]
        for name, value in (("offsets", offset), ("sizes", size)):
            if value is not None:
                entry[name][row] = value

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
        lambda index: set_part("vision", "values", 2, index["fields"]["vision"]["parts"]["values"]["offsets"][0])(index),
        lambda index: index["fields"]["mass"]["parts"]["values"].pop("sizes"),
        lambda index: index["fields"]["mass"]["parts"]["values"]["sizes"].pop(),
        lambda index: index["fields"]["mass"]["parts"]["values"]["offsets"].append(0),
        set_part("mass", "values", 0, offset=-1),
        set_part("mass", "values", 0, size=-1),
        set_part("mass", "values", 0, offset=1 << 40),
        set_part("mass", "values", 0, size=1 << 63),
        set_part("mass", "values", 0, offset=(1 << 63) - 1, size=(1 << 63) - 1),
        set_part("mass", "values", 0, offset=0.5),
    ],
)
def test_an_index_that_lies_is_refused(change):
    with pytest.raises(CorruptShardError):
        webdataset_shard.read_shard(SPEC, with_index(change))


@pytest.mark.parametrize("text", [b"", b"[" * 100_000, b"1" * 5000, b"{}", b"[]", b"\xff"])
def test_an_index_that_is_none_is_refused(text):
    with pytest.raises(CorruptShardError):
        webdataset_shard.read_shard(SPEC, with_index_text(text))


def test_an_index_that_says_something_twice_is_refused():
    text = members_of(written())[0][1]
    with pytest.raises(CorruptShardError, match="twice"):
        webdataset_shard.read_shard(SPEC, with_index_text(text.replace(b'"size":', b'"size":1,"size":')))


@pytest.mark.parametrize("header", [{"name": "index"}, {"type": tarfile.SYMTYPE}, {"size": -512}, {"size": 1 << 40}])
def test_an_archive_that_does_not_begin_with_an_index_is_refused(header):
    with pytest.raises(CorruptShardError, match="expected '__index__'"):
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
    with pytest.raises(CorruptShardError, match=f"row {key_of(1)}, field '(mass|attention)'"):
        shard.row(1)


def test_a_decompression_bomb_is_refused_before_it_is_decompressed():
    data = bytearray(written())
    shard = webdataset_shard.read_shard(SPEC, bytes(data))
    at = shard.frames["attention", "codes"].starts[1]
    data[at + 4 : at + 8] = (1 << 31).to_bytes(4, "little")
    with pytest.raises(CorruptShardError, match="a Blosc frame declares"):
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
        lambda rest: rest.insert(2, rest[2]),
        lambda rest: rest.append(("more", b"")),
        lambda rest: rest.reverse(),
        lambda rest: rest.__setitem__(0, (rest[0][0], rest[0][1].replace(b"sample-0", b"sample-1"))),
        lambda rest: rest.__setitem__(1, (rest[3][0], rest[1][1])),
        lambda rest: rest.__setitem__(1, (rest[1][0], rest[1][1] + b"x")),
    ],
)
def test_an_audit_finds_members_that_are_not_what_the_index_says(change):
    with pytest.raises(CorruptShardError, match=r"from byte [1-9][0-9]* on the archive is not what"):
        audited(change)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE])
def test_an_audit_finds_members_that_are_no_plain_files(kind):
    with pytest.raises(CorruptShardError):
        audited(list, type=kind)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 37])
def test_an_audit_finds_every_flipped_bit_but_those_within_a_frame(every):
    data = written(2)
    shard = webdataset_shard.read_shard(SPEC, data)
    places = [place for frames in shard.frames.values() for place in zip(frames.starts, frames.stops, strict=True)]
    inside = {at for start, stop in places for at in range(start, stop)}
    assert inside
    after_index = range(members_of(data)[1][0].offset, len(data))
    for at in sorted(set(after_index) - inside)[::every]:
        changed = bytearray(data)
        changed[at] ^= 1
        with pytest.raises(CorruptShardError, match=f"from byte {at} on"):
            webdataset_shard.audit(bytes(changed), webdataset_shard.read_shard(SPEC, bytes(changed)))


def test_an_audit_finds_rows_that_share_a_value_without_an_image():
    data = with_index(lambda index: index["ids"][2].__setitem__(2, "f" * 64))
    with pytest.raises(CorruptShardError, match="is not what follows from its index"):
        webdataset_shard.audit(data, webdataset_shard.read_shard(SPEC, data))


def test_frames_that_take_more_room_than_the_archive_has_are_refused():
    def overlap(index: Index) -> None:
        for row in range(4):
            set_part("mass", "values", row, offset=0, size=index["size"] // 3)(index)

    with pytest.raises(CorruptShardError, match="names frames of"):
        webdataset_shard.read_shard(SPEC, with_index(overlap))


def test_headers_know_no_time_and_no_user():
    for info, _ in members_of(written()):
        assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)
        assert not info.pax_headers


def test_a_row_takes_two_members_however_many_fields_it_has():
    names = [info.name for info, _ in members_of(written())]
    assert names == ["__index__", *(f"{key_of(i)}.{ending}" for i in range(4) for ending in ("json", "blosc"))]


def test_the_frames_of_a_row_follow_each_other_as_its_json_says():
    data = written()
    members = {info.name: content for info, content in members_of(data)}
    shard = webdataset_shard.read_shard(SPEC, data)
    for i, key in enumerate(shard.keys):
        fields, frames, at = json.loads(members[f"{key}.json"])["fields"], members[f"{key}.blosc"], 0
        for field, (_, _, _, parts) in fields.items():
            for part, (_, size) in (parts or {}).items():
                assert shard.frame(field, part, i) == frames[at : at + size]
                at += size
        assert at == len(frames) > 0


def test_what_is_said_of_a_row_without_attention_fits_into_one_block():
    wide = {"input_ids": "int32", "labels": "int32", "topk_rank_steps": "uint16"}
    narrow = {"sketch": "uint8", "topk_logprob_codes": "uint8", "tail_logmass": "uint8"}
    spec = CacheSpec(tuple(FieldSpec(name, ("A",), dtype, "exact") for name, dtype in (wide | narrow).items()), {})
    values = {f.name: np.random.default_rng(0).integers(0, 255, 4000).astype(f.dtype) for f in spec.fields}
    data = webdataset_shard.write_shard(packed(spec, [Row(key_of(0), "000000123456", "f" * 64, values)]))
    sizes = {info.name: info.size for info, _ in members_of(data)}
    assert sizes[f"{key_of(0)}.json"] <= 512


def test_only_the_first_row_of_an_image_has_its_frames_and_the_others_say_so():
    data = written()
    described = [json.loads(content) for info, content in members_of(data) if info.name.endswith(".json")]
    dtype, codec, shape, parts = described[1]["fields"]["vision"]
    assert parts["values"][1] > 0
    assert described[2]["fields"]["vision"] == [dtype, codec, shape, None]
    assert described[2]["image_sha256"] == described[1]["image_sha256"]
    assert [None for row in described for field in row["fields"].values() if field[3] is None] == [None]
    shard = webdataset_shard.read_shard(SPEC, data)
    assert shard.frame("vision", "values", 2) == shard.frame("vision", "values", 1)
