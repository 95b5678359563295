"""``alignkd check`` as people call it: exit codes, one JSON object, tables of 80 columns, hidden characters shown escaped."""

from __future__ import annotations

import json
import unicodedata

import pytest
from test_check import MESSY
from test_hostile_text import HOSTILE
from tiny_runs import IMAGES, SAMPLES, record, write_data

NAMES = {
    *("data", "images", "model", "samples", "usable", "rejected", "reasons", "read_otherwise", "duplicates", "text_only"),
    *("several_images", "images_per_sample", "turns_per_sample", "system_turns", "provenances", "lengths", "cut"),
    *("image_files", "sources", "seconds"),
}
BROKEN = {"text": b"hello", "cut short": b'[{"id": "a", "conv', "empty": b"", "zeros": b"\0" * 100, "deep": b"[" * 200_000}


def test_the_figures_are_one_json_object_with_names_that_stay(door, tmp_path):
    data = write_data(tmp_path / "d.json", SAMPLES)
    ended = door("check", "--data", data, "--images", IMAGES, "--json")
    assert ended.code == 0, ended.stderr
    figures = json.loads(ended.stdout)
    assert set(figures) == NAMES
    assert (figures["samples"], figures["usable"]) == (len(SAMPLES), len(SAMPLES))


def test_people_get_tables_of_80_columns_and_a_last_line_that_says_it_all(door, tmp_path):
    ended = door("check", "--data", write_data(tmp_path / "d.json", MESSY), "--images", IMAGES)
    assert ended.code == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "samples" in lines[-1]
    assert "can be used" in lines[-1]
    for words in ("characters a sample", "image files", "there more than once", "cannot be used because", "gone 1, gone 2"):
        assert words in ended.stdout, words


def test_nothing_usable_is_exit_code_2_after_the_figures(door, tmp_path):
    data = write_data(tmp_path / "d.json", [record(f"s{i}", f"{i}.jpg", "<image>\nWhat?", "This.") for i in range(3)])
    ended = door("check", "--data", data, "--images", IMAGES, "--json")
    assert ended.code == 2
    assert json.loads(ended.stdout)["reasons"][0]["samples"] == 3
    assert "none of 3 samples can be used" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_message_and_exit_code_2(door, tmp_path, kind):
    (tmp_path / "d.json").write_bytes(BROKEN[kind])
    ended = door("check", "--data", tmp_path / "d.json", "--json")
    assert (ended.code, ended.stdout) == (2, "")
    assert "d.json" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_text_from_others_is_shown_escaped(door, tmp_path):
    bad = [record(f"bad {text}", f"{text}.png", "<image> What?", "This.") for text in HOSTILE.values()]
    data = write_data(tmp_path / "d.json", [*bad, *(record(text, None, text, text) for text in HOSTILE.values()), SAMPLES[0]])
    ended = door("check", "--data", data, "--images", IMAGES)
    assert ended.code == 0, ended.stderr
    shown = ended.stdout + ended.stderr
    hidden = {c for c in shown if c not in "\n\u200c\u200d" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert not hidden
    figures = json.loads(door("check", "--data", data, "--images", IMAGES, "--json", "--first", 20).stdout)
    assert {f"bad {text}" for text in HOSTILE.values()} <= {n["id"] for one in figures["reasons"] for n in one["first"]}
