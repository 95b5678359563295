"""Files of a benchmark that were made to do harm: one message each; no reader waits, fills the memory or leaves its folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket

import pytest
from benchmark_conformance import FIXTURES, lines_of, score_of, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from test_benchmarks_mmbench import table, write_table

from alignkd.errors import AlignkdError, DataError
from alignkd.pipeline.evaluate.benchmarks.contract import PROTOCOLS
from alignkd.pipeline.evaluate.benchmarks.registry import open_benchmark

NAMES = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())
RELEASE = "MME_Benchmark_release_version"
READ = {
    **dict.fromkeys(("llava",), ("questions.json", "predictions.jsonl")),
    "gqa": ("testdev_balanced_questions.json", "llava_gqa_testdev_balanced.jsonl", "predictions.jsonl"),
    "sqa": ("problems.json", "pid_splits.json", "llava_test_CQM-A.json", "predictions.jsonl"),
    "textvqa": ("TextVQA_0.5.1_val.json", "llava_textvqa_val_v051_ocr.jsonl", "predictions.jsonl"),
    "vqav2": (
        *("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
        "predictions.jsonl",
    ),
    "pope": ("coco/coco_pope_random.json", "llava_pope_test.jsonl", "predictions.jsonl"),
    "mme": (
        *(f"{RELEASE}/color/000000120555.txt", f"{RELEASE}/artwork/questions_answers_YN/14337.txt"),
        *("llava_mme.jsonl", "predictions.jsonl"),
    ),
    "mmbench": ("mmbench_dev_en_20231003.tsv", "predictions.jsonl"),
}
FILES = [(name, file) for name, files in READ.items() for file in files]


@pytest.fixture(autouse=True)
def alarm():
    """A reader that waits for ever fails its test."""

    def stop(*_):
        raise TimeoutError("a reader waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def repr_start(value):
    return repr(value)[:20]


def message_of(call):
    """What an error of alignkd's own says; empty without one. Any other error passes."""
    try:
        call()
    except AlignkdError as error:
        return str(error)
    return ""


def copied(tmp_path, name):
    return shutil.copytree(FIXTURES / name, tmp_path / name)


def refused(name, folder):
    with pytest.raises(DataError) as error:
        score_of(name, folder, folder / "predictions.jsonl")
    assert len(str(error.value)) < 2000
    return str(error.value)


def test_every_benchmark_is_tried():
    assert set(READ) == set(NAMES)


@pytest.mark.parametrize(("name", "file"), FILES)
def test_what_is_no_plain_file_is_refused_and_nobody_waits_for_it(tmp_path, monkeypatch, name, file):
    folder = copied(tmp_path, name)
    path = folder / file
    path.unlink()
    os.mkfifo(path)
    assert "a named pipe" in refused(name, folder)
    path.unlink()
    path.mkdir()
    assert path.name in refused(name, folder)
    path.rmdir()
    path.symlink_to("/dev/zero")
    assert "a device" in refused(name, folder)
    path.unlink()
    monkeypatch.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path.name)
        assert path.name in refused(name, folder)


@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_file_that_is_far_too_large_is_refused_before_it_is_read(tmp_path, name, file):
    folder = copied(tmp_path, name)
    with (folder / file).open("r+b") as opened:
        opened.truncate(5 * 2**30)  # takes no room
    message = refused(name, folder)
    assert "allowed" in message or name == "llava", message  # which reads records one by one, and finds more after the last


@pytest.mark.parametrize(("name", "file"), FILES)
@pytest.mark.parametrize(
    "damage", [b"\x00", b"\x00" * 5000, b"\xff\xfe", b"\xed\xa0\x80", b"\r\x00\n", b'"' * 999, b"[" * 99_999], ids=repr_start
)
def test_nul_bytes_and_others_that_no_text_has_meet_no_traceback(tmp_path, name, file, damage):
    folder = copied(tmp_path, name)
    whole = (folder / file).read_bytes()
    for place in (0, len(whole) // 2, len(whole)):
        (folder / file).write_bytes(whole[:place] + damage + whole[place:])
        for protocol in PROTOCOLS:
            assert len(message_of(lambda: score_of(name, folder, folder / "predictions.jsonl", protocol))) < 2000  # noqa: B023


@pytest.mark.parametrize("inside", ["coco", "coco/coco_pope_random.json", "llava_pope_test.jsonl"])
def test_links_that_lead_back_to_themselves_are_refused_for_pope(tmp_path, inside):
    looped(copied(tmp_path, "pope"), inside, "pope")


@pytest.mark.parametrize("inside", [RELEASE, f"{RELEASE}/color", f"{RELEASE}/color/000000120555.txt", "predictions.jsonl"])
def test_links_that_lead_back_to_themselves_are_refused_for_mme(tmp_path, inside):
    looped(copied(tmp_path, "mme"), inside, "mme")


def looped(folder, inside, name):
    path = folder / inside
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(path.name)
    if inside.startswith("llava_"):  # the questions are built without it
        assert open_benchmark(name, folder).questions == open_benchmark(name, FIXTURES).questions
    else:
        refused(name, folder)


def test_a_folder_that_holds_itself_is_walked_once(tmp_path):
    folder = copied(tmp_path, "mme")
    (folder / RELEASE / "color" / "images").symlink_to(".")
    (folder / RELEASE / "color" / "questions_answers_YN").symlink_to(".")
    (folder / RELEASE / "again").symlink_to(".")
    before = open_benchmark("mme", FIXTURES)
    (folder / "llava_mme.jsonl").unlink()
    assert len(open_benchmark("mme", folder).questions) == len(before.questions)


def name_pictures(folder, name, reference):
    """Official files whose pictures are all called ``reference``."""

    def edit(file, change):
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    if name == "gqa":
        (folder / "llava_gqa_testdev_balanced.jsonl").unlink()
        edit("testdev_balanced_questions.json", lambda rows: [row.update(imageId=reference) for row in rows.values()])
    elif name == "textvqa":
        for file in READ["textvqa"][1:2]:
            (folder / file).unlink()
        (folder / "llava_textvqa_val_v051_no_ocr.jsonl").unlink()
        edit("TextVQA_0.5.1_val.json", lambda rows: rows.update(data=[rows["data"][0] | {"image_id": reference}]))
        edit("TextVQA_Rosetta_OCR_v0.2_val.json", lambda rows: rows.update(data=[rows["data"][0] | {"image_id": reference}]))
    elif name == "pope":
        (folder / "llava_pope_test.jsonl").unlink()
        for path in (folder / "coco").iterdir():
            write_lines(path, [line | {"image": reference} for line in lines_of(path)])
    elif name == "mme":
        first, *lines = lines_of(folder / "llava_mme.jsonl")
        stem = first["image"].split("/")[1].split(".")[0]
        write_lines(folder / "llava_mme.jsonl", [first | {"image": f"{reference}/{stem}"}, *lines])
    elif name == "mmbench":
        header, *rows = table(folder / "mmbench_dev_en_20231003.tsv")
        rows = [[reference if column == "image" else value for column, value in zip(header, row, strict=True)] for row in rows]
        write_table(folder / "mmbench_dev_en_20231003.tsv", [header, *rows])
    else:
        edit("questions.json", lambda rows: [row.update(image=reference) for row in rows if "image" in row])


@pytest.mark.parametrize("name", ["gqa", "llava", "mmbench", "mme", "pope", "textvqa"])
@pytest.mark.parametrize(
    "reference",
    [
        "../../secret",
        "../../../../../../etc/passwd",
        "/etc/passwd",
        "a\0b",
        "x" * 5000,
        "a/" * 3000,
        "\ud800",
        "",
        ".",
        "..",
        "~",
    ],
    ids=repr_start,
)
def test_pictures_outside_the_folder_are_not_read(tmp_path, name, reference):
    for ending in ("", ".jpg"):
        (tmp_path / f"secret{ending}").write_text("secret")
    folder = copied(tmp_path, name)
    name_pictures(folder, name, reference)
    opened = []
    if message_of(lambda: opened.append(open_benchmark(name, folder))):
        return
    (benchmark,) = opened
    missing = []
    refused_all = message_of(lambda: missing.extend(benchmark.missing_images()))
    for image in {image for question in benchmark.questions for image in question.images}:
        found = []
        refusal = message_of(lambda: found.append(benchmark.read_image(image)))  # noqa: B023
        assert b"secret" not in b"".join(found)
        assert refusal if image in missing else refusal or found
        assert refused_all or image in missing or found


@settings(max_examples=40)
@given(
    data=st.data(),
    text=st.text(st.characters(exclude_categories=()), max_size=40) | st.sampled_from(["a\tYes\nb\tNo", "\tyes\n \tno"]),
)
def test_no_text_beside_a_picture_of_mme_meets_a_traceback(tmp_path_factory, data, text):
    folder = tmp_path_factory.mktemp("fuzz") / "mme"
    shutil.copytree(FIXTURES / "mme", folder, ignore=shutil.ignore_patterns("*.jpg", "*.png"))
    path = data.draw(st.sampled_from(sorted((folder / RELEASE).rglob("*.txt"))))
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    if data.draw(st.booleans()):
        (folder / "llava_mme.jsonl").unlink()
    for protocol in PROTOCOLS:
        with pytest.raises(AlignkdError):
            score_of("mme", folder, folder / "predictions.jsonl", protocol)
    shutil.rmtree(folder)
