"""Parquet, saved datasets and WebDataset shards hold the samples of a JSON file: same keys, order, text, images, weights."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from data_shapes import add, write_parquet, write_saved, write_webdataset
from tiny_runs import IMAGES, SAMPLES, content, record, student_sha256, train, write_cache, write_data

from alignkd.errors import AlignkdError, ConfigError, DataError, SampleError
from alignkd.pipeline.config.shared import DataSettings
from alignkd.pipeline.data.images.places import read_place, size_at
from alignkd.pipeline.data.open_samples import describe_data, known_samples, open_samples
from alignkd.pipeline.data.preparer import Preparer, check_text
from alignkd.pipeline.data.readers.columnar import columns
from alignkd.pipeline.data.readers.files.shard_file import ShardFile
from alignkd.pipeline.data.readers.webdataset import WebDatasetSamples

FORGED = [
    record("no turns", None),
    record("speaker", None, "q", "a") | {"conversations": [{"from": "robot", "value": "q"}]},
    record("two images", ["0.png", "3.png"], "<image>\nq", "a"),
]


def saved_splits(folder, records, images):
    write_saved(folder / "train", records, images)
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    return folder


SHAPES = {
    "a Parquet file": lambda folder, records: write_parquet(folder / "a.parquet", records, IMAGES),
    "a folder of Parquet files": lambda folder, records: write_parquet(folder / "f", records, IMAGES, shards=2),
    "a pattern of Parquet files": lambda folder, records: write_parquet(folder / "f", records, IMAGES, shards=3) / "*.parquet",
    "Parquet beside images": lambda folder, records: write_parquet(folder / "p.parquet", records, None),
    "a saved dataset": lambda folder, records: write_saved(folder / "s", records, IMAGES),
    "a saved dataset of one split": lambda folder, records: saved_splits(folder / "d", records, IMAGES),
    "WebDataset in braces": lambda folder, records: write_webdataset(folder / "w", records, IMAGES),
    "a folder of WebDataset": lambda folder, records: write_webdataset(folder / "w", records, IMAGES) and folder / "w",
    "a pattern of WebDataset": lambda folder, records: (
        write_webdataset(folder / "w", records, IMAGES) and folder / "w" / "*.tar"
    ),
    "WebDataset beside images": lambda folder, records: write_webdataset(folder / "w", records, None),
}
EMBEDDED = [name for name in SHAPES if "beside" not in name]
TRAINED = ["a Parquet file", "WebDataset in braces", pytest.param("a saved dataset", marks=pytest.mark.slow)]
ONE_OF_EACH = ["a Parquet file", "a saved dataset", "WebDataset in braces"]


def opened(data, images=IMAGES, **settings):
    return open_samples(DataSettings(data=str(data), images=None if images is None else str(images), **settings))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The samples of the JSON file."""
    return opened(write_data(tmp_path_factory.mktemp("plain") / "samples.json", SAMPLES))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Each shape, written once."""
    made = {}

    def write(shape):
        if shape not in made:
            made[shape] = str(SHAPES[shape](tmp_path_factory.mktemp("shape"), SAMPLES))
        return made[shape]

    return write


def assert_same(found, expected):
    assert np.array_equal(found.keys, expected.keys)
    assert np.array_equal(found.image_hashes, expected.image_hashes)
    assert np.array_equal(found.image_counts, expected.image_counts)
    assert (len(found), found.faults) == (len(expected), expected.faults)
    for i in range(len(found)):
        one, other = found[i], expected[i]
        assert (one.id, one.images, one.turns, one.key) == (other.id, other.images, other.turns, other.key)
        assert list(map(read_place, one.places)) == list(map(read_place, other.places))
        assert list(map(size_at, one.places)) == list(map(size_at, other.places))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_holds_the_samples_of_the_json_file(written, plain, shape):
    assert_same(opened(written(shape), None if shape in EMBEDDED else IMAGES), plain)


IN_STORES = [*ONE_OF_EACH, "a folder of Parquet files", "a folder of WebDataset", "a pattern of WebDataset"]


@pytest.mark.parametrize(("shape", "store"), [*((shape, "memory") for shape in IN_STORES), ("a pattern of WebDataset", "s3")])
def test_every_shape_is_read_from_a_store(request, written, plain, shape, store):
    url = request.getfixturevalue("s3_url") if store == "s3" else "memory://shapes"
    path = Path(written(shape))
    folder, last = (path, "") if path.is_dir() else (path.parent, f"/{path.name}")
    files, root = fsspec.core.url_to_fs(f"{url}/{folder.parent.name}")
    for file in folder.rglob("*.*"):
        files.pipe_file(f"{root}/{file.relative_to(folder)}", file.read_bytes())
    data = f"{url}/{folder.parent.name}{last}"
    assert_same(opened(data, None), plain)
    assert describe_data(DataSettings(data=data))["bytes"] == describe_data(DataSettings(data=written(shape)))["bytes"]


@pytest.mark.parametrize("shape", SHAPES)
def test_known_places_need_no_index_and_travel_to_workers(written, shape, monkeypatch):
    samples = opened(written(shape))
    order = np.array([4, 1, 5])
    monkeypatch.setattr(type(samples), "_index", None)
    settings = DataSettings(data=written(shape), images=str(IMAGES))
    locators = {name: places[order] for name, places in samples.locators().items()}
    assert all(places.ndim == 1 and places.dtype.kind == "i" and (places != -1).all() for places in locators.values())
    known = pickle.loads(pickle.dumps(known_samples(settings, samples.keys[order], locators)))
    assert [known[i] for i in range(3)] == [samples[int(i)] for i in order]
    assert known_samples(settings, samples.keys, {"starts": order, "lengths": order}) is None


@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_threads_share_samples(written, plain, shape):
    samples = opened(written(shape), None)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: (samples[i].key, *map(read_place, samples[i].places)), list(range(6)) * 20))
    assert found == [(plain.key(i), *map(read_place, plain[i].places)) for i in range(6)] * 20


@pytest.mark.parametrize("shape", EMBEDDED)
def test_text_is_read_without_images(written, shape, monkeypatch):
    samples = opened(written(shape), None)
    read = []
    plain_read = ShardFile.read
    monkeypatch.setattr(ShardFile, "read", lambda self, start, length: read.append(length) or plain_read(self, start, length))
    monkeypatch.setattr(columns, "_digest", None)
    monkeypatch.setattr("alignkd.pipeline.data.readers.columnar.arrow_rows.image_values", None)
    assert [samples[i].id for i in range(6)] == [one["id"] for one in SAMPLES]
    assert max(read, default=0) < 1000


@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_inputs_of_the_model_are_the_same(written, plain, shape, teacher_vlm):
    preparer = Preparer.of(teacher_vlm, template="v1", max_length=512)
    samples = opened(written(shape), None)
    for i in range(len(plain)):
        one, other = preparer(samples[i]), preparer(plain[i])
        assert one.image_sha256 == other.image_sha256
        assert one.input.input_ids.tolist() == other.input.input_ids.tolist()
        assert one.input.labels.tolist() == other.input.labels.tolist()


@pytest.fixture(scope="module")
def trained(data, cache, tmp_path_factory):
    """The digest of a student that was trained from the JSON file."""
    out = tmp_path_factory.mktemp("json") / "out"
    train(data, cache, out, epochs=1.0)
    return student_sha256(out)


@pytest.mark.parametrize(
    "shape", ["a Parquet file", "WebDataset in braces", pytest.param("a saved dataset", marks=pytest.mark.slow)]
)
def test_a_cache_written_from_json_trains_from_any_shape_to_the_same_bits(written, cache, trained, tmp_path, shape):
    train(written(shape), cache, tmp_path / "out", epochs=1.0, images=None)
    assert student_sha256(tmp_path / "out") == trained


@pytest.mark.parametrize(
    "shape", ["a Parquet file", "WebDataset in braces", pytest.param("a saved dataset", marks=pytest.mark.slow)]
)
def test_the_teacher_writes_the_same_cache_from_any_shape_and_goes_on_with_it(written, cache, tmp_path, shape):
    for _ in range(2):
        write_cache(written(shape), tmp_path / "cache", images=None)
    assert content(tmp_path / "cache") == content(cache)


@pytest.mark.parametrize("shape", SHAPES)
def test_bad_records_are_rejected_by_name_and_never_the_file(tmp_path, shape):
    samples = opened(SHAPES[shape](tmp_path, [*FORGED, SAMPLES[0]]))
    assert (len(samples), samples.faults) == (4, 3)
    for i, bad in enumerate(FORGED):
        with pytest.raises(SampleError, match=r"(row \d|sample 's00000\d')"):
            check_text(samples[i])
        assert samples[i].id == bad["id"]
    check_text(samples[3])
    assert samples[3].id == SAMPLES[0]["id"]


@pytest.mark.parametrize("shape", EMBEDDED)
def test_images_without_a_path_are_known_by_their_bytes(tmp_path, plain, shape):
    import hashlib

    writer = {"Parquet": write_parquet, "saved": write_saved, "WebDataset": write_webdataset}
    write = next(made for name, made in writer.items() if name in shape)
    samples = opened(write(tmp_path / "x.parquet", SAMPLES, IMAGES, paths=False), None)
    for i in range(len(plain)):
        data = list(map(read_place, samples[i].places))
        assert data == list(map(read_place, plain[i].places))
        assert samples[i].images == tuple(hashlib.sha256(one).hexdigest() for one in data)


def test_an_image_with_a_path_alone_lies_in_the_image_folder_and_cannot_leave_it(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = SAMPLES[0]["conversations"]
    images = [{"bytes": None, "path": "0.png"}, {"bytes": None, "path": "../../secret"}, {"bytes": None, "path": None}]
    rows = [{"id": str(i), "image": image, "conversations": turns} for i, image in enumerate(images)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    samples = opened(tmp_path / "x.parquet")
    assert read_place(samples[0].places[0]) == (IMAGES / "0.png").read_bytes()
    with pytest.raises(SampleError, match="outside the image folder"):
        read_place(samples[1].places[0])
    assert "neither bytes nor a path" in samples[2].fault


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.jpg": b"x"}, "there is no member KEY.json: found jpg"),
        ({"a.json": b"{"}, "KEY.json is not JSON"),
        ({"a.json": b"[" * 100_000}, "nested too deeply"),
        ({"a.json": b"[]"}, "KEY.json holds no object"),
        ({"a.json": json.dumps(SAMPLES[0]).encode(), "a.0.png": b"x", "a.1.png": b"y"}, "names 1 images, and 2 lie beside it"),
    ],
)
def test_members_that_make_no_sample_reject_it_alone(tmp_path, members, words):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in members.items():
            add(tar, name, data)
        add(tar, "b.json", json.dumps(SAMPLES[4]).encode())
    samples = opened(tmp_path / "x.tar")
    assert (len(samples), samples.faults) == (2, 1)
    assert words in samples[0].fault
    assert "sample 'a'" in samples[0].fault
    assert samples[1].id == SAMPLES[4]["id"]


@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_a_file_that_is_cut_short_is_one_message(tmp_path, shape):
    path = Path(SHAPES[shape](tmp_path, SAMPLES))
    file = path if path.is_file() else sorted(next(iter(tmp_path.iterdir())).glob("*0*"))[-1]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match=f"{file.name}.*(not a whole|damaged)"):
        opened(path)


@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_a_file_that_has_changed_is_not_mistaken_for_the_old_one(tmp_path, shape):
    data = SHAPES[shape](tmp_path, SAMPLES)
    samples = opened(data, None)
    keys, locators = samples.keys, samples.locators()
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    SHAPES[shape](tmp_path, [{**one, "id": f"other{i}"} for i, one in enumerate(reversed(SAMPLES))])
    known = known_samples(DataSettings(data=str(data)), keys, locators)
    for i in range(6):
        with pytest.raises(DataError, match=r"has changed|there is no sample|no header|cut short"):
            known[i]


@pytest.mark.parametrize("shape", ["a Parquet file", "a saved dataset"])
def test_without_pyarrow_one_message_names_the_extra(written, monkeypatch, shape):
    data = written(shape)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs the package pyarrow.*pip install 'alignkd\[data\]'"):
        opened(data)


def test_of_several_splits_one_is_chosen(tmp_path):
    for split in ("train", "test"):
        write_saved(tmp_path / "d" / split, SAMPLES, IMAGES)
        write_parquet(tmp_path / f"{split}.parquet", SAMPLES, IMAGES)
        (tmp_path / "p" / "data").mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / f"{split}.parquet", tmp_path / "p" / "data" / f"{split}-00000-of-00001-ab12.parquet")
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=r"holds the splits train, test; give one of them: --data \S+/d/train"):
        opened(tmp_path / "d")
    with pytest.raises(
        ConfigError, match=r"holds the splits test, train; give one of them: --data '\S+/data/train-\*\.parquet'"
    ):
        opened(tmp_path / "p")
    assert len(opened(tmp_path / "d" / "test")) == len(opened(tmp_path / "p" / "data" / "test-*.parquet")) == 6


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", ".hidden", "a\\b", None])
def test_a_saved_dataset_names_files_of_its_own_folder(tmp_path, name):
    folder = write_saved(tmp_path / "s", SAMPLES, IMAGES)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match="names no files of its own folder"):
        opened(folder)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("none-*.parquet", "no file has such a name"),
        ("{000..001}.tar", "No such file"),
        ("x.parquet", "No such file"),
        ("empty", "a directory, expected a plain file"),
    ],
)
def test_data_that_is_not_there_is_one_message(tmp_path, data, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AlignkdError, match=words):
        opened(tmp_path / data)


def test_what_was_unpacked_may_vanish(tmp_path, local_cache_folder, plain):
    samples = opened(write_parquet(tmp_path / "a.parquet", SAMPLES, IMAGES), None)
    assert_same(samples, plain)
    for path in local_cache_folder.glob("data/??/*"):
        path.unlink()
    assert_same(pickle.loads(pickle.dumps(samples)), plain)
    assert isinstance(opened(write_webdataset(tmp_path / "w", SAMPLES, IMAGES)), WebDatasetSamples)
