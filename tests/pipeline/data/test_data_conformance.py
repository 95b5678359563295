"""Every reader, from every kind of storage: the same samples, whatever the shape they are written in."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from data_conformance import BAD, GOOD, SHAPES, mixed, write_json
from tiny_runs import IMAGES

from alignkd.errors import SampleError
from alignkd.pipeline.config.shared import DataSettings
from alignkd.pipeline.data.images.places import read_place
from alignkd.pipeline.data.open_samples import known_samples, open_samples
from alignkd.pipeline.data.preparer import Preparer

STORAGES = ["path", "file", "memory", "s3"]
EVERYWHERE = [(shape, storage) for shape in SHAPES for storage in STORAGES]


@pytest.fixture
def there(request, put, tmp_path):
    """Settings of good and bad records in a shape, with their images, where the test's storage is."""
    folder = tmp_path / "data"
    folder.mkdir()
    name = SHAPES[request.param](mixed(), folder)
    for path in IMAGES.iterdir():
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / path.name).write_bytes(path.read_bytes())
    base = put(folder)
    return DataSettings(data=f"{base}/{name}", images=f"{base}/images")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The same records as a JSON list of LLaVA on this machine."""
    folder = tmp_path_factory.mktemp("expected")
    samples = open_samples(DataSettings(data=str(folder / write_json(mixed(), folder)), images=str(IMAGES)))
    return [samples[i] for i in range(len(samples))]


def read_all(samples):
    return [samples[i] for i in range(len(samples))]


everywhere = pytest.mark.parametrize(("there", "put"), EVERYWHERE, indirect=True)
every_shape = pytest.mark.parametrize(("there", "put"), [(shape, "path") for shape in SHAPES], indirect=True)


@everywhere
def test_the_same_content_has_the_same_key_order_turns_and_pictures(there, expected):
    samples = open_samples(there)
    assert samples.faults == len(BAD)
    assert len(samples) == len(expected)
    for found, one in zip(read_all(samples), expected, strict=True):
        assert bool(found.fault) == bool(one.fault)
        assert found.id == one.id
        if not one.fault:
            assert (found.key, found.turns, found.images) == (one.key, one.turns, one.images)
            pictures = [(IMAGES / name).read_bytes() for name in one.images]
            assert [read_place(place) for place in found.places] == pictures
    assert [samples.key(i) for i in range(len(samples))] == [sample.key for sample in read_all(samples)]


@every_shape
def test_the_same_content_has_the_same_ids_and_labels(there, expected, student_vlm):
    preparer = Preparer.of(student_vlm, template="v1", max_length=2048)
    for found, one in zip(read_all(open_samples(there)), expected, strict=True):
        if one.fault:
            with pytest.raises(SampleError):
                preparer(found)
            continue
        ours, theirs = preparer(found), preparer(one)
        np.testing.assert_array_equal(ours.input.input_ids, theirs.input.input_ids)
        np.testing.assert_array_equal(ours.input.labels, theirs.input.labels)
        assert ours.image_sha256 == theirs.image_sha256


@every_shape
def test_a_bad_record_is_rejected_by_name_and_hides_no_other(there):
    samples = read_all(open_samples(there))
    bad = {sample.id: sample.fault for sample in samples if sample.fault}
    assert bad.keys() == {one["id"] for one in BAD}
    assert all(repr(name) in fault for name, fault in bad.items())
    assert len(samples) - len(bad) == len(GOOD)


@everywhere
def test_random_access_is_iteration_in_copies_and_threads_too(there):
    samples = open_samples(there)
    whole = read_all(samples)
    copy = pickle.loads(pickle.dumps(samples))
    backwards = list(range(len(whole)))[::-1]
    assert [copy[i] for i in backwards] == whole[::-1]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(samples.__getitem__, backwards * 4)) == whole[::-1] * 4


@everywhere
def test_a_plan_finds_the_samples_again_without_an_index(there):
    samples = open_samples(there)
    order = samples.by_image()
    planned = samples.select(order)
    assert all(places.dtype.kind == "i" and len(places) == len(order) for places in planned.locators().values())
    known = known_samples(there, planned.keys, planned.locators())
    assert known is not None
    assert [(s.key, s.places, bool(s.fault)) for s in read_all(known)] == [
        (s.key, s.places, bool(s.fault)) for s in read_all(planned)
    ]


@every_shape
def test_images_and_their_hashes_say_which_samples_share_a_picture(there, expected):
    samples = open_samples(there)
    assert samples.image_counts.tolist() == [len(one.images) for one in expected]
    hashes = samples.image_hashes.tolist()
    for i, one in enumerate(expected):
        for j, other in enumerate(expected[:i]):
            assert (hashes[i] == hashes[j]) == (one.images == other.images)


@every_shape
def test_the_first_samples_and_a_sample_of_them_are_the_same_in_every_shape(there, expected):
    first = open_samples(DataSettings(data=there.data, images=there.images, limit=3))
    assert [s.id for s in read_all(first)] == [one.id for one in expected[:3]]
    good = {one.key for one in expected if not one.fault}
    halves = {key: key[16:] for key in good}
    some = read_all(open_samples(DataSettings(data=there.data, images=there.images, sample=len(expected) - 1)))
    kept = [s.key for s in some if not s.fault]
    assert kept == [one.key for one in expected if one.key in kept]
    assert len(kept) >= len(good) - 1
    assert all(halves[key] == max(halves.values()) for key in good - set(kept))
