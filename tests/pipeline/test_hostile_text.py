"""Text from others is shown escaped wherever people read it, and stored as it came."""

from __future__ import annotations

import io
import json
import shutil
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_runs import IMAGES, SAMPLES, STUDENT, TEACHER, content, record, write_data

from alignkd.pipeline.report.page import page
from alignkd.pipeline.runtime import progress as progress_module
from alignkd.pipeline.runtime.printable import html_text, json_text, printable, printable_lines
from alignkd.pipeline.runtime.progress import progress_bar

HOSTILE = {
    "escapes": "\x1b[2J\x1b]0;owned\x07\nError: fine",
    "reading direction": "a\u202egnp.exe\u2066",
    "half a pair": "\ud800x",
    "eight-bit controls": "\x9b2J\x85next",
    "separators": "one\u2028two\u2029three",
    "markup": "[red]x[/red] [/] <b>&amp;</b>",
    "formula": "$\\frac{$ _^",
    "tags": "\U000e0041\U0001f600",
}
ANY_TEXT = st.text(st.characters(exclude_categories=()))


def hidden(text):
    return {c for c in text if c not in "\n\u200c\u200d" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}


@given(ANY_TEXT)
def test_what_is_shown_is_one_line_without_hidden_characters(text):
    assert not hidden(printable(text))
    assert "\n" not in printable(text)
    assert not hidden(html_text(text).replace("\t", ""))
    assert not {"<", '"', "'"} & set(html_text(text))


@given(st.text("abcé中文ع😀 -_/.,:'\"\\"))
def test_ordinary_text_of_any_language_is_shown_as_it_is(text):
    assert printable(text) == text


@given(st.text(st.sampled_from(["a", "\n", "\x1b", " "])))
def test_no_line_of_a_message_begins_where_a_line_of_ours_would(text):
    assert all(line.startswith("  ") for line in printable_lines(text, indent="  ").split("\n")[1:])


@given(st.dictionaries(ANY_TEXT, ANY_TEXT))
def test_json_gives_back_any_text_on_one_line_and_hides_nothing(value):
    text = json_text(value)
    assert json.loads(text) == value
    assert len(text.splitlines()) == 1
    assert not hidden(text)
    text.encode()


def test_a_page_cannot_be_given_elements_by_a_title():
    text = page("</title><script>\x1b\u202e", [])
    assert "<script>" not in text
    assert not hidden(text)


@pytest.mark.parametrize("terminal", [True, False])
def test_titles_and_notes_of_a_bar_are_taken_as_text(monkeypatch, terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    monkeypatch.setattr(progress_module, "stderr_console", console)
    with progress_bar("distill [/] \x1b]0;owned\x07", 2, "steps") as progress:
        progress.note("[/]\x1b]0;owned\x07")
        progress.advance()
    shown = console.file.getvalue()
    assert "\x1b]0;" not in shown
    assert not terminal or "distill [/] \\x1b]0;owned\\x07" in shown


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Samples with hostile ids, and as many that are rejected, in a folder with a hostile name."""
    folder = tmp_path_factory.mktemp("hostile") / "\x1b]0;name\x07\u202e[bold]"
    folder.mkdir()
    used = [{**SAMPLES[i % 4], "id": text} for i, text in enumerate(HOSTILE.values())]
    bad = [record(f"bad {text}", f"{text}.png", "<image> What?", "This.") for text in HOSTILE.values()]
    return write_data(folder / "d.json", used + bad)


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def hostile_cache(door, hostile, request):
    cache = hostile.parent / f"cache {request.param}"
    words = ["cache-teacher", "--teacher", TEACHER, "--images", IMAGES, "--device", "cpu", "--shard-samples", 4]
    shown(door(*words, "--data", hostile, "--cache", cache, "--format", request.param))
    return cache


def shown(finished, code=0):
    """What a command printed, which holds no hidden character."""
    text = finished.stdout + finished.stderr
    assert finished.code == code, finished.stderr
    assert "Traceback" not in text
    assert not hidden(text), sorted(map(ascii, hidden(text)))
    return finished.stdout


def test_ids_and_names_are_shown_escaped_and_stored_as_they_came(door, hostile, hostile_cache, tmp_path):
    words = shown(door("cache", "status", hostile_cache))
    assert "\\x1b]0;owned" in "".join(words.split())
    assert not any(line.startswith("Error") for line in words.splitlines())
    listed = tmp_path / "rejected.jsonl"
    figures = json.loads(shown(door("cache", "status", hostile_cache, "--json", "--rejected", listed)))
    wanted = {f"bad {text}" for text in HOSTILE.values()}
    assert {sample["id"] for sample in figures["rejected"]} == wanted
    assert {json.loads(line)["id"] for line in listed.read_text().splitlines()} == wanted
    assert figures["samples_done"] == len(HOSTILE)


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "half a pair"])
def test_a_row_of_a_hostile_id_is_found_shown_and_drawn(door, hostile, hostile_cache, tmp_path, name):
    asked = ["--id", HOSTILE[name], "--plot", tmp_path / "row.png", "--save", tmp_path / "row.npz"]
    shown(door("cache", "inspect", hostile_cache, *asked))
    assert (tmp_path / "row.png").stat().st_size > 1000
    assert np.load(tmp_path / "row.npz")["input_ids"].size


def test_looking_after_a_cache_of_hostile_ids(door, hostile_cache, tmp_path):
    copy = shutil.copytree(hostile_cache, tmp_path / "\x1b[31mcopy")
    for command in (["verify"], ["verify", "--json"], ["repair"], ["inspect"]):
        shown(door("cache", *command, copy))
    shown(door("cache", "convert", copy, tmp_path / "other\x07"))
    assert content(tmp_path / "other\x07") == content(hostile_cache)
    (copy / "cache.json").unlink()
    for command in ("verify", "repair", "inspect"):
        shown(door("cache", command, copy), code=2)


@pytest.mark.slow
def test_the_other_commands_with_hostile_ids(door, hostile, tmp_path):
    common = ["--data", hostile, "--images", IMAGES, "--device", "cpu"]
    shown(door("show", "--model", STUDENT, *common, "--id", HOSTILE["escapes"], "--plot", tmp_path / "show.png"))
    shown(door("show", "--model", STUDENT, *common, "--id", HOSTILE["formula"], "--plot", tmp_path / "show.png"))
    out = tmp_path / "\x1b[31mout"
    shown(door("evaluate", "--model", STUDENT, *common, "--max-new-tokens", 2, "--out", out))
    found = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in found] == list(HOSTILE.values())


def test_stage_two_with_hostile_ids(door, hostile, tmp_path):
    recipe = tmp_path / "[red]\x1b]0;owned\x07.yaml"
    recipe.write_text("base: sft\n")
    words = ["distill", "--student", STUDENT, "--data", hostile, "--images", IMAGES, "--device", "cpu", "--recipe", recipe]
    out = tmp_path / "out\u202e"
    shown(door(*words, "--out", out, "--max-steps", 8, "--batch-size", 2, "--workers", 0))
    rejected = set(json.loads((out / "result.json").read_text())["rejected_samples"])
    assert rejected <= {f"bad {text}" for text in HOSTILE.values()}
    assert rejected


@pytest.mark.parametrize(
    "words",
    [
        ["\x1b]0;owned\x07"],
        ["--\x1b]0;owned\x07"],
        ["show", "--\x1b]0;owned\x07"],
        ["distill", "--student", "\x1b]0;owned\x07", "--data", "\u202e", "--out", "o", "--recipe", "sft"],
        ["distill", "--student", "s", "--data", "d", "--out", "o", "--dtype", "\x1b]0;owned\x07"],
        ["distill", "--student", "s", "--data", "d", "--out", "o", "--settings", "\x1b]0;owned\x07"],
        ["cache", "status", "\x1b]0;owned\x07"],
        ["cache", "\x1b]0;owned\x07"],
        ["evaluate", "--model", "\x1b]0;owned\x07", "--data", "\x1b]0;owned\x07"],
        ["--debug", "cache", "status", "memory://\x1b]0;owned\x07"],
    ],
    ids=lambda words: ascii(" ".join(words))[1:40],
)
def test_what_a_command_line_holds_is_answered_escaped(door, words):
    finished = door(*words)
    assert finished.code != 0
    if "--debug" not in words:
        assert not hidden(finished.stdout + finished.stderr)
    assert "owned\x07" not in finished.stderr or "--debug" in words
