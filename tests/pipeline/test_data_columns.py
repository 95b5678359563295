"""Rows of Arrow and Parquet tables as records: the same as those of JSON, without touching images."""

from __future__ import annotations

import hashlib
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkd.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from alignkd.pipeline.data.readers.columnar import columns  # noqa: E402
from alignkd.pipeline.data.readers.columnar.arrow_rows import ArrowRows  # noqa: E402
from alignkd.pipeline.data.readers.columnar.parquet_text import open_parquet, write_images, write_text  # noqa: E402

TURNS = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
DIGEST = hashlib.sha256(b"bytes").hexdigest()


def read(records):
    batch = pa.RecordBatch.from_pylist(records)
    return list(columns.records(batch, columns.record_columns(batch.schema, "table")))


TEXT = st.text(max_size=6)
TURN_LISTS = st.lists(st.fixed_dictionaries({"from": TEXT, "value": TEXT}), max_size=3)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"conversations": TURN_LISTS},
            optional={"id": TEXT, "image": TEXT.filter(bool), "images": st.lists(TEXT.filter(bool), max_size=2)},
        ),
        min_size=1,
        max_size=5,
    )
)
def test_rows_are_the_records_that_the_table_was_made_of(records):
    names = {name for record in records for name in record}
    table = [{name: record.get(name) for name in names} for record in records]
    assert read(table) == records


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (json.dumps(TURNS), TURNS),
        ({"from": ["human", "gpt"], "value": ["<image>\nq", "a"]}, TURNS),
        ("[not json", "[not json"),
        ([{"from": "human", "value": None}], [{"from": "human"}]),
    ],
    ids=["JSON in a text", "a list for each field", "a text that is not JSON", "a null in a turn"],
)
def test_turns_in_every_form_that_tables_store(value, expected):
    assert read([{"conversations": value}]) == [{"conversations": expected}]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({"bytes": b"bytes", "path": "a.png"}, "a.png"),
        ({"bytes": b"bytes", "path": None}, DIGEST),
        ({"bytes": None, "path": "a.png"}, "a.png"),
        ({"bytes": b"", "path": ""}, ""),
        (b"bytes", DIGEST),
        ("a.png", "a.png"),
        ([{"bytes": b"bytes", "path": None}, {"bytes": b"x", "path": "b.png"}], [DIGEST, "b.png"]),
        ([b"bytes", b"bytes"], [DIGEST, DIGEST]),
    ],
)
def test_an_image_is_known_by_its_path_else_by_its_bytes(image, expected):
    assert read([{"conversations": TURNS, "image": image}])[0]["image"] == expected


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "x", "label": 1}, "has the columns text, label; expected 'conversations'"),
        ({"conversations": 7}, "the column 'conversations' holds int64, expected lists of turns"),
        ({"conversations": TURNS, "image": {"height": 1}}, "the column 'image' holds struct<height: int64>"),
    ],
)
def test_a_table_without_the_columns_is_one_message(record, words):
    with pytest.raises(DataError, match=words):
        read([record])


def rows_of(path, where):
    return ArrowRows(lambda: path.open("rb"), where)


def written(write, file, path):
    with path.open("wb") as target:
        write(file, target, "x")


def parquet(tmp_path, records, **options):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(records), path, **options)
    return path


@pytest.mark.parametrize("missing", [[], [3], range(10)], ids=["no path missing", "one path missing", "no path"])
def test_the_text_of_a_parquet_file_has_the_rows_of_the_file(tmp_path, missing):
    images = [{"bytes": b"%d" % i, "path": None if i in missing else f"{i}.png"} for i in range(10)]
    rows = [{"id": str(i), "conversations": TURNS, "image": images[i] if i % 2 else None} for i in range(10)]
    path = parquet(tmp_path, rows, row_group_size=4)
    file = open_parquet(path.open("rb"), "x")
    written(write_text, file, tmp_path / "x.arrow")
    text = rows_of(tmp_path / "x.arrow", "x")
    assert len(text) == 10
    assert b"png" not in (tmp_path / "x.arrow").read_bytes() or len(missing) < 10
    expected = read(rows)
    assert [text.record(i) for i in range(10)] == expected
    for group, first in enumerate((0, 4, 8)):
        with (tmp_path / "images").open("wb") as target:
            write_images(file, group, target, "x")
        images = rows_of(tmp_path / "images", "x")
        assert [images.images(i) for i in range(len(images))] == [
            [b"%d" % i] * (i % 2) for i in range(first, min(first + 4, 10))
        ]


def test_bytes_of_images_are_not_read_where_paths_are_there(tmp_path, monkeypatch):
    rows = [{"conversations": TURNS, "images": [{"bytes": b"%d" % i, "path": f"{i}.png"}] * 2} for i in range(10)]
    file = open_parquet(parquet(tmp_path, rows).open("rb"), "x")
    asked = []
    iter_batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, size, groups, names, **rest: asked.append(names) or iter_batches(self, size, groups, names, **rest),
    )
    written(write_text, file, tmp_path / "x.arrow")
    assert asked
    assert not any("bytes" in name or name == "images" for names in asked for name in names)


def test_one_row_of_an_arrow_file_touches_no_image(tmp_path, monkeypatch):
    rows = [{"conversations": TURNS, "image": {"bytes": b"%d" % i, "path": f"{i}.png"}} for i in range(10)]
    for name, new in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        table = pa.Table.from_pylist(rows)
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        table = rows_of(tmp_path / name, name)
        with monkeypatch.context() as patch:
            patch.setattr(columns, "_digest", None)
            assert [table.record(i)["image"] for i in (9, 0, 4)] == ["9.png", "0.png", "4.png"]
        assert table.images(7) == [b"7"]


@pytest.mark.parametrize("kept", [0, 3, 200, -100, -1])
def test_a_file_that_is_cut_short_is_one_message(tmp_path, kept):
    path = parquet(tmp_path, [{"conversations": TURNS}] * 100)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="x: not a whole Parquet file"):
        open_parquet(path.open("rb"), "x")


def test_a_damaged_page_is_one_message(tmp_path):
    path = parquet(tmp_path, [{"conversations": TURNS, "id": str(i)} for i in range(1000)], use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    file = open_parquet(io.BytesIO(bytes(data)), "x")
    with pytest.raises(DataError, match="x: damaged"):
        written(write_text, file, tmp_path / "x.arrow")


def test_a_forged_arrow_file_is_one_message(tmp_path):
    table = pa.Table.from_pylist([{"conversations": "[]", "id": str(i)} for i in range(50)])
    with pa.ipc.new_stream(str(tmp_path / "x"), table.schema) as writer:
        writer.write_table(table)
    whole = (tmp_path / "x").read_bytes()
    offsets = (2).to_bytes(4, "little") + (4).to_bytes(4, "little")
    at = whole.index(offsets)
    (tmp_path / "x").write_bytes(whole[:at] + b"\xff\xff\xff\x7f" + whole[at + 4 :])
    with pytest.raises(DataError, match="damaged"):
        rows_of(tmp_path / "x", "x").record(0)
    (tmp_path / "x").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a whole Arrow file"):
        rows_of(tmp_path / "x", "x").record(0)
