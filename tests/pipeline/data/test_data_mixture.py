"""Several data as one: repeated --data, a mixture in YAML, weights, and pictures of one name in two folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from data_conformance import GOOD, as_messages, as_typed, write_json, write_lines
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import IMAGES, SAMPLES, content, record, stage_one_config, stage_two_config, student_sha256, train, write_cache

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.errors import ConfigError
from alignkd.pipeline.config.shared import DataSettings
from alignkd.pipeline.data.open_samples import known_samples, open_samples
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.tower_features import tower_features
from alignkd.pipeline.feeding.draw import draw
from alignkd.pipeline.feeding.order import BatchOrder
from alignkd.pipeline.stage_one.worker import cache_teacher
from alignkd.pipeline.training.run import distill


def written(folder, records, write=write_json):
    folder.mkdir(parents=True)
    return str(folder / write(records, folder))


def mixture(path, *datasets):
    path.write_text(yaml.safe_dump({"datasets": list(datasets)}))
    return str(path)


@pytest.fixture
def two_folders(tmp_path):
    """Two datasets, each with a picture of its own under the name 1.png."""
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("RGB", (40, 40), colour).save(tmp_path / name / "images" / "1.png")
        records = [record(f"{name}{i}", "1.png", f"<image>\nWhat colour, {i}?", name) for i in range(3)]
        write_json(records, tmp_path / name)
    return tmp_path


def settings_of_two(folder, **more):
    return DataSettings(
        data=tuple(str(folder / name / "d.json") for name in ("red", "blue")),
        images=tuple(str(folder / name / "images") for name in ("red", "blue")),
        **more,
    )


def test_two_pictures_of_one_name_stay_two(two_folders, student_vlm):
    samples = open_samples(settings_of_two(two_folders))
    preparer = Preparer.of(student_vlm, template="v1", max_length=2048)
    all_samples = [samples[i] for i in range(6)]
    assert [sample.source for sample in all_samples] == [s.data for s in samples.sources for _ in range(3)]
    assert len(set(samples.image_hashes[:3])) == len(set(samples.image_hashes[3:])) == 1
    assert len(set(samples.image_hashes)) == 2
    plain = [preparer(sample) for sample in all_samples]
    assert len({made.image_sha256 for made in plain}) == 2
    assert plain[0].input.images.ne(plain[3].input.images).any()
    places = sorted({place for sample in all_samples for place in preparer.places(sample)})
    preparer.features = tower_features(student_vlm, preparer, places)
    for before, after in zip(plain, map(preparer, all_samples), strict=True):
        assert after.image_sha256 == before.image_sha256
    assert preparer(all_samples[0]).input.images.ne(preparer(all_samples[3]).input.images).any()


@pytest.mark.slow
def test_stage_one_and_two_take_two_folders_as_what_they_are(two_folders, tmp_path):
    options = {"images": settings_of_two(two_folders).images}
    config = settings_of_two(two_folders)

    cache_teacher(replace(stage_one_config(two_folders, tmp_path / "cache", shard_samples=4), data=config.data, **options))
    reader = CacheReader(tmp_path / "cache")
    samples = open_samples(config)
    hashes = [reader.row(samples.key(i), {"input_ids"}).image_sha256 for i in range(6)]
    assert len(set(hashes[:3])) == len(set(hashes[3:])) == 1
    assert hashes[0] != hashes[3]
    known = known_samples(config, reader.plan.keys, reader.plan.extras)
    assert known is not None
    for position in range(6):
        sample = known[position]
        assert Path(sample.places[0]).parent == two_folders / sample.turns[1][1] / "images"
    for images, name in ((options["images"], "as-options"), (str(two_folders / "red" / "images"), "in-yaml")):
        data = (
            config.data
            if name == "as-options"
            else mixture(
                two_folders / "both.yaml",
                {"name": "r", "data": "red/d.json"},
                {"name": "b", "data": "blue/d.json", "images": "blue/images"},
            )
        )

        run = stage_two_config(two_folders, tmp_path / "cache", tmp_path / name, epochs=1.0)
        distill(replace(run, data=data, images=images))
    assert student_sha256(tmp_path / "as-options") == student_sha256(tmp_path / "in-yaml")


@pytest.mark.slow
def test_a_cache_written_from_json_trains_from_messages_to_the_same_bits(tmp_path):
    data = written(tmp_path / "llava", SAMPLES)
    write_cache(data, tmp_path / "cache")
    train(data, tmp_path / "cache", tmp_path / "from-json", epochs=1.0)
    for shape in (as_messages, as_typed):
        other = written(tmp_path / shape.__name__, [shape(one) for one in SAMPLES], write_lines)
        train(other, tmp_path / "cache", tmp_path / f"from-{shape.__name__}", epochs=1.0)
        assert student_sha256(tmp_path / f"from-{shape.__name__}") == student_sha256(tmp_path / "from-json")
    write_cache(other, tmp_path / "other-cache")
    assert content(tmp_path / "other-cache") == content(tmp_path / "cache")


def test_a_mixture_has_names_weights_and_limits(tmp_path):
    written(tmp_path / "a", GOOD)
    written(tmp_path / "b", [{**one, "id": f"b{i}"} for i, one in enumerate(SAMPLES)], write_lines)
    path = mixture(
        tmp_path / "mix.yaml",
        {"name": "first", "data": "a/d.json", "limit": 3},
        {"data": "b/d.jsonl", "weight": 2.5, "images": str(IMAGES)},
    )
    samples = open_samples(DataSettings(data=path, images=str(IMAGES)))
    assert samples.datasets == f"first 3, d.jsonl {len(SAMPLES)}"
    assert samples.select(np.array([4, 0, 2])).counts == {"first": 2, "d.jsonl": 1}
    assert samples.counts == {"first": 3, "d.jsonl": len(SAMPLES)}
    assert samples.weights.tolist() == [1.0] * 3 + [2.5] * len(SAMPLES)
    assert [samples[i].source for i in (0, 3)] == ["first", "d.jsonl"]
    assert all(Path(place).is_file() for i in range(len(samples)) for place in samples[i].places)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: []", "expected one key, datasets"),
        ("[1]", "expected one key, datasets"),
        ("{datasets: [{data: a.json}], more: 1}", "expected one key, datasets"),
        ("datasets: [{data: a.json, wieght: 2}]", "wieght is not known"),
        ("datasets: [{name: x}]", "expected an object with data"),
        ("datasets: [{data: a.json, weight: 0}]", "weight is 0, expected a number above 0"),
        ("datasets: [{data: a.json, weight: true}]", "weight is True"),
        ("datasets: [{data: a.json, limit: 1.5}]", "limit is 1.5"),
        ("datasets: [{data: a.json}, {data: b/a.json}]", "two datasets are named 'a.json'"),
        ("datasets: [{data: other.yaml}]", "cannot hold another mixture"),
        ("datasets: [", "is not YAML"),
        ("datasets: [!!python/object/apply:os.system ['x']]", "is not YAML"),
    ],
)
def test_a_mixture_that_says_what_it_cannot_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"m\.yaml.*{message}"):
        open_samples(DataSettings(data=str(tmp_path / "m.yaml")))


@pytest.mark.parametrize(
    "given",
    [
        {"data": ("a", "b"), "images": ("x", "y", "z")},
        {"data": "a", "images": ("x", "y")},
        {"data": ("a", "b"), "data_weight": (1.0,)},
        {"data": ("a", "b"), "data_weight": (1.0, -1.0)},
        {"data": ()},
    ],
)
def test_options_that_do_not_go_together_are_refused(given):
    with pytest.raises(ConfigError, match="--"):
        DataSettings(**given)


def test_merged_turns_are_joined_and_else_rejected_by_name(tmp_path, student_vlm):
    twice = record("twice", None, "What is two", "Four.")
    twice["conversations"].insert(1, {"from": "human", "value": "and two?"})
    data = written(tmp_path / "d", [twice])
    preparer = Preparer.of(student_vlm, template="v1", max_length=2048)
    with pytest.raises(ValueError, match="alternate"):
        preparer(open_samples(DataSettings(data=data))[0])
    merged = open_samples(DataSettings(data=data, merge_turns=True))[0]
    assert merged.turns == (("human", "What is two\nand two?"), ("gpt", "Four."))
    joined = written(tmp_path / "j", [record("twice", None, "What is two\nand two?", "Four.")])
    assert merged.key == open_samples(DataSettings(data=joined))[0].key
    assert preparer(merged).input.input_ids.size


def test_a_sample_keeps_who_wrote_its_answers_apart_from_its_key(tmp_path):
    plain, by_model = dict(SAMPLES[0]), {**SAMPLES[0], "provenance": {"model": "teacher-7b", "weights": "ab", "settings": {}}}
    samples = open_samples(DataSettings(data=written(tmp_path / "d", [plain, by_model]), images=str(IMAGES)))
    assert [samples[i].provenance for i in (0, 1)] == ["", "teacher-7b"]
    assert samples.key(0) == samples.key(1)


@given(
    weights=st.lists(st.sampled_from([0.2, 0.5, 1.0, 1.25, 2.0, 3.7]), min_size=1, max_size=30),
    seed=st.integers(0, 5),
)
def test_weights_say_how_often_samples_come_and_nobody_is_left_out(weights, seed):
    array, epochs = np.array(weights), 20
    drawn = [draw(array, seed, epoch) for epoch in range(epochs)]
    times = np.stack([np.bincount(one, minlength=len(array)) for one in drawn])
    if (array >= 1).any():
        assert (times >= np.floor(array)).all()
        assert (times <= np.ceil(array)).all()
        for weight in set(weights):
            total = times[:, array == weight].sum(axis=0)
            assert np.ptp(total) <= 1  # of one weight, none comes more often than another
            assert abs(total.sum() - weight * epochs * len(total)) <= 1
    np.testing.assert_array_equal(drawn[7], draw(array, seed, 7))


@pytest.mark.parametrize("grouped", [False, True])
def test_an_order_with_weights_is_a_pure_function_that_takes_each_as_often_as_drawn(grouped):
    weights = np.repeat([1.0, 2.5, 0.5], 20)
    lengths = np.random.default_rng(0).integers(5, 300, 60)

    def order():
        return BatchOrder(
            np.arange(60) // 10, seed=3, window=2, batch_size=4, lengths=lengths, group_by_length=grouped, weights=weights
        )

    for epoch in (5, 0, 1):
        batches = order().epoch(epoch)
        again = order()
        again.epoch(9)
        assert all((a == b).all() for a, b in zip(batches, again.epoch(epoch), strict=True))
        np.testing.assert_array_equal(np.sort(np.concatenate(batches)), draw(weights, 3, epoch))
        assert len(batches) == again.steps_per_epoch(epoch)


def test_equal_weights_change_no_order():
    plain, one = (
        BatchOrder(np.arange(20) // 5, seed=1, window=2, batch_size=4, weights=weights) for weights in (None, np.ones(20))
    )
    assert all((a == b).all() for a, b in zip(plain.epoch(2), one.epoch(2), strict=True))


def test_json_of_the_first_run_is_as_it_was(tmp_path):
    data = written(tmp_path / "d", SAMPLES)
    write_cache(data, tmp_path / "cache")
    plan = CacheReader(tmp_path / "cache").plan
    assert set(plan.extras) == {"starts", "lengths"}
    size, count = Path(data).stat().st_size, len(json.loads(Path(data).read_text()))
    assert plan.meta == {"data_file": "d.json", "bytes": size, "records": count}
