"""``alignkd check`` finds everything that is wrong with data, and says of each sample what stage one would say."""

from __future__ import annotations

import shutil
import signal
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import IMAGES, SAMPLES, TEACHER, record, write_cache, write_data

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.errors import ConfigError, DataError
from alignkd.pipeline.check import image_facts, run
from alignkd.pipeline.check.look import SampleLook, content_hash
from alignkd.pipeline.check.report import Checked, report
from alignkd.pipeline.check.run import check
from alignkd.pipeline.check.tally import Tally, kind_of
from alignkd.pipeline.check.verdicts import PlainJudge
from alignkd.pipeline.config.check import CheckConfig
from alignkd.pipeline.data.open_samples import open_samples
from alignkd.pipeline.data.sample import read_sample
from alignkd.pipeline.runtime.signals import Interrupted

ASKED = "<image>\nWhat?"
MESSY = [
    *SAMPLES,
    {**SAMPLES[0], "id": "copy"},
    SAMPLES[1],
    record("gone 1", "gone/1.jpg", ASKED, "This."),
    record("gone 2", "gone/2.jpg", ASKED, "This."),
    record("outside", "../../etc/passwd", ASKED, "This."),
    record("damaged", "damaged.jpg", ASKED, "This."),
    record("cut off", "cut.png", ASKED, "This."),
    record("second gone", ["0.png", "gone/1.jpg"], "<image><image> Which?", "This."),
    record("dark", "dark.png", ASKED, "Nothing."),
    record("deep", "deep.png", ASKED, "A slope."),
    record("alpha", "alpha.png", ASKED, "A stone."),
    record("long", "0.png", ASKED, "word " * 2500),
    record("half", None, "why", "a \ud800 b"),
    record("empty", None, "why", ""),
    record("never answered", None, "why", "so"),
    record("unused", "0.png", "What is it?", "a ball"),
    {"id": "nothing said", "conversations": []},
    5,
]
MESSY[-4]["conversations"] = MESSY[-4]["conversations"][:1] * 2
REJECTED_BY_PLAIN = {
    "gone 1",
    "gone 2",
    "outside",
    "damaged",
    "cut off",
    "second gone",
    "half",
    "never answered",
    "nothing said",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "images"
    shutil.copytree(IMAGES, folder)
    rng = np.random.default_rng(0)
    Image.new("RGB", (300, 200), (9, 9, 9)).save(folder / "dark.png")
    Image.fromarray(np.linspace(0, 60_000, 1200).astype(np.uint16).reshape(40, 30)).save(folder / "deep.png")
    Image.fromarray(rng.integers(0, 255, (50, 60, 4), np.uint8), "RGBA").save(folder / "alpha.png")
    (folder / "damaged.jpg").write_bytes(b"no picture")
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("messy") / "d.json", MESSY)


def checked(data, images=None, **settings):
    return check(CheckConfig(data=str(data), images=None if images is None else str(images), first=100, **settings))


def rejected(figures):
    return {named["id"]: named["reason"] for one in figures["reasons"] for named in one["first"]}


def words(entries):
    return {one["reason"]: (one["samples"], [named["id"] for named in one["first"]]) for one in entries}


@pytest.fixture(scope="module")
def figures(messy, pictures):
    return checked(messy, pictures)


def test_every_sample_that_cannot_be_used_is_named_with_its_reason(figures):
    found = rejected(figures)
    number = next(name for name, why in found.items() if why.startswith(f"record {len(MESSY) - 1}: found a number"))
    assert set(found) == REJECTED_BY_PLAIN | {number}
    assert figures["samples"] == len(MESSY)
    assert figures["rejected"] == len(found)
    assert figures["usable"] == len(MESSY) - len(found)
    assert "No such file" in found["second gone"]
    assert "lies outside the image folder" in found["outside"]
    assert found["never answered"] == "turn 1 is from 'human'; turns must alternate human, gpt"
    missing = next(one for one in figures["reasons"] if one["class"] == "image missing")
    assert (missing["samples"], [one["id"] for one in missing["first"]]) == (3, ["gone 1", "gone 2", "second gone"])


def test_what_samples_are_is_counted(figures):
    readable = [r for r in MESSY if isinstance(r, dict) and r["conversations"]]
    images = [len(read_sample(r).images) for r in readable]
    assert figures["text_only"] == images.count(0)
    assert figures["several_images"] == sum(count > 1 for count in images)
    assert figures["images_per_sample"] == {str(n): images.count(n) for n in sorted(set(images))}
    turns = [len(r["conversations"]) for r in readable]
    assert figures["turns_per_sample"] == {str(n): turns.count(n) for n in sorted(set(turns))}
    assert words(figures["read_otherwise"]) == {
        "the image is not used: the text has no <image>": (1, ["unused"]),
        "an answer has no words": (1, ["empty"]),
    }


def test_duplicates_are_found_by_key_and_by_content(figures):
    same, content = figures["duplicates"]["same_sample"], figures["duplicates"]["same_content"]
    assert same == {"samples": 1, "first": [SAMPLES[1]["id"]]}
    assert content == {"samples": 1, "first": [{"id": "copy", "as": SAMPLES[0]["id"]}]}


def test_images_are_counted_by_size_and_format_and_doubtful_ones_named(figures, pictures):
    files = figures["image_files"]
    good = ["0.png", "1.png", "2.png", "3.png", "dark.png", "deep.png", "alpha.png"]
    assert (files["referenced"], files["missing"], files["unreadable"]) == (len(good) + 4, 2, 2)
    assert files["formats"] == {"PNG": len(good)}
    longer = [max(Image.open(pictures / name).size) for name in good]
    assert {one["from"]: one["images"] for one in files["longer_sides"]} == {
        1: sum(side <= 224 for side in longer),
        225: sum(side > 224 for side in longer),
    }
    doubtful = {kind: [name.rsplit("/", 1)[-1] for name in found] for kind, (_, found) in words(files["doubtful"]).items()}
    assert doubtful == {
        "nothing to see: one value": ["dark.png"],
        "more than 8 bits a channel": ["deep.png"],
        "values cut at 255": ["deep.png"],
        "transparency": ["alpha.png"],
    }


def test_lengths_are_a_histogram_of_all_usable_samples(figures):
    lengths = figures["lengths"]
    usable = [r for r in MESSY if isinstance(r, dict) and r["id"] not in rejected(figures)]
    own = sorted(sum(len(turn["value"]) for turn in r["conversations"]) for r in usable)
    assert (lengths["unit"], lengths["least"], lengths["most"]) == ("characters", own[0], own[-1])
    assert lengths["median"] == own[(len(own) - 1) // 2]
    for one in lengths["histogram"]:
        assert one["samples"] == sum(one["from"] <= length <= one["to"] for length in own)
    assert sum(one["samples"] for one in lengths["histogram"]) == len(own) == figures["usable"]


@pytest.mark.slow
def test_with_a_model_samples_are_rejected_exactly_as_stage_one_rejects_them(messy, pictures, tmp_path):
    figures = checked(messy, pictures, model=str(TEACHER), max_length=300)
    write_cache(messy, tmp_path / "cache", images=str(pictures), max_length=300, max_rejected=100)
    by_stage_one = {r.sample_id or r.key: r.reason for r in CacheReader(tmp_path / "cache").rejected.values()}
    assert rejected(figures) == by_stage_one
    assert "empty" in by_stage_one
    assert [one["id"] for one in figures["cut"]["first"]] == ["long"]
    assert figures["lengths"]["unit"] == "positions"
    assert (figures["model"]["template"], figures["model"]["loaded_weights"]) == ("v1", False)


@pytest.mark.parametrize("model", [None, TEACHER])
def test_each_image_is_read_once_and_none_without_reading(messy, pictures, monkeypatch, model):
    read = []
    monkeypatch.setattr(image_facts, "read_place", lambda place, real=image_facts.read_place: read.append(place) or real(place))
    model = None if model is None else str(model)
    checked(messy, pictures, model=model)
    assert len(read) == len(set(read)) == 11
    read.clear()
    figures = checked(messy, None, model=model, read_images=False)
    assert not read
    assert figures["image_files"] is None
    assert "image missing" not in {one["class"] for one in figures["reasons"]}


def test_the_datasets_of_a_mixture_are_told_apart(messy, pictures, tmp_path):
    write_data(tmp_path / "other.json", SAMPLES)
    (tmp_path / "m.yaml").write_text(
        f"datasets:\n- {{data: {messy}, name: messy}}\n- {{data: other.json, name: good, limit: 4}}\n"
    )
    figures = checked(tmp_path / "m.yaml", pictures)
    found = {one["name"]: (one["samples"], one["rejected"]) for one in figures["sources"]}
    assert found == {"messy": (len(MESSY), len(REJECTED_BY_PLAIN) + 1), "good": (4, 0)}
    assert figures["samples"] == len(MESSY) + 4


def test_limit_and_sample_choose_what_is_checked(messy, pictures):
    assert checked(messy, pictures, limit=5)["samples"] == 5
    assert checked(messy, pictures, sample=7)["samples"] == 7


@pytest.mark.processes
def test_several_processes_find_what_one_finds(messy, pictures, figures, monkeypatch):
    for name in ("_FEW_SAMPLES", "_FEW_IMAGES"):
        monkeypatch.setattr(run, name, 0)
    for name in ("_SAMPLES_AT_ONCE", "_IMAGES_AT_ONCE"):
        monkeypatch.setattr(run, name, 3)
    several = checked(messy, pictures, workers=2)
    assert {**several, "seconds": 0} == {**figures, "seconds": 0}


def test_a_signal_ends_it_at_the_next_part(messy, monkeypatch):
    monkeypatch.setattr(run, "_SAMPLES_AT_ONCE", 3)
    real, calls = SampleLook.__call__, []

    def look(self, span):
        calls.append(span)
        signal.raise_signal(signal.SIGTERM)
        return real(self, span)

    monkeypatch.setattr(SampleLook, "__call__", look)
    with pytest.raises(Interrupted, match="stopped by SIGTERM, before everything was checked"):
        checked(messy, read_images=False)
    assert len(calls) == 1


@settings(max_examples=30, deadline=None)
@given(borders=st.sets(st.integers(1, len(MESSY) - 1)), first=st.integers(0, 3))
def test_wherever_the_data_is_divided_the_sum_is_the_same(messy, borders, first):
    config = CheckConfig(data=str(messy), read_images=False, first=first)
    samples = open_samples(config)
    look, whole = SampleLook(samples, PlainJudge(None), first), dict[str, Tally]()
    ends = [0, *sorted(borders), len(samples)]
    parts = [look(span) for span in pairwise(ends)]
    for part in parts:
        for name, tally in part.tallies.items():
            whole.setdefault(name, Tally(first)).merge(tally)
    once = look((0, len(samples)))
    contents = np.concatenate([part.contents_N for part in parts])
    summed = report(Checked(config, samples, whole, contents, None, None))
    assert summed == report(Checked(config, samples, once.tallies, once.contents_N, None, None))


def test_content_is_told_apart_by_what_is_shown_and_said_and_by_nothing_else():
    def of(*given):
        return content_hash(read_sample(record(*given)))

    assert of("a", None, "why", "so") == of("b", None, "why", "so")
    others = [
        of("a", None, "wh", "yso"),
        of("a", "x", "<image>why", "so"),
        of("a", None, "why", "so", "", ""),
        of("a", None, "why"),
    ]
    assert len({of("a", None, "why", "so"), *others}) == 5


def test_reasons_that_differ_in_names_and_numbers_alone_are_one_kind():
    assert kind_of("image /a/1.jpg: No such file", "/a/1.jpg") == kind_of("image /b c/22.jpg: No such file", "/b c/22.jpg")
    assert kind_of("record 7 (id 'it\\'s'): 'image' is 5") == kind_of("record 12,000 (id \"x\"): 'image' is 41")
    assert len(kind_of("'" * 10_000_000)) < 200


def test_settings_of_a_model_need_one(messy):
    with pytest.raises(ConfigError, match="--max-length is about a model"):
        CheckConfig(data=str(messy), max_length=100)


def test_an_image_folder_that_is_not_there_is_refused_where_images_are_read(messy, tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        checked(messy, tmp_path / "nowhere")
    assert checked(messy, tmp_path / "nowhere", read_images=False)["samples"] == len(MESSY)


@pytest.mark.parametrize("text", ["hello", "", "[]", '{"data": []}', '[{"id": 1}, {"id"', "\x00\x01", "[" * 100_000])
def test_data_that_cannot_be_read_at_all_is_one_message(tmp_path, text):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(DataError):
        checked(tmp_path / "d.json")
