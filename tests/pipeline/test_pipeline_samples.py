from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import SAMPLES, record, write_data

from alignkd.errors import DataError, SampleError, TransientError
from alignkd.pipeline.data import records as records_module
from alignkd.pipeline.data import samples as samples_module
from alignkd.pipeline.data.sample import parse_sample
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.runtime import retries

TEXTS = st.text(max_size=12)
RECORDS = st.builds(
    lambda name, question, answer, images, extra: {
        **record(name, None, question.replace("<image>", "") + "<image>" * len(images), answer.replace("<image>", "")),
        "image": images,
        "extra": extra,
    },
    TEXTS,
    TEXTS,
    TEXTS,
    st.lists(st.text(min_size=1, max_size=5), max_size=2),
    st.recursive(
        st.none() | st.booleans() | st.integers() | TEXTS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=6,
    ),
)


def read(path):
    file = SampleFile(path)
    assert [file.key(i) for i in range(len(file))] == [file[i].key for i in range(len(file))]
    return [file[i] for i in range(len(file))]


def test_a_json_list_and_json_lines_give_the_same_samples_and_keys(tmp_path):
    write_data(tmp_path / "a.json", SAMPLES)
    (tmp_path / "b.json").write_text(json.dumps(SAMPLES, indent=3, ensure_ascii=False))
    (tmp_path / "c.jsonl").write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in SAMPLES) + "\n")
    first = read(tmp_path / "a.json")
    assert first == read(tmp_path / "b.json") == read(tmp_path / "c.jsonl")
    assert [s.id for s in first] == [r["id"] for r in SAMPLES]
    assert [len(s.images) for s in first] == [1, 1, 1, 1, 0, 2]


@settings(max_examples=60)
@given(
    records=st.lists(RECORDS, min_size=1, max_size=4),
    chunk=st.integers(8, 64),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    bom=st.booleans(),
)
def test_any_text_and_nesting_is_read_whole_over_any_chunk_border(tmp_path_factory, records, chunk, indent, ascii_only, bom):
    path = tmp_path_factory.mktemp("chunks") / "data.json"
    mark = b"\xef\xbb\xbf" if bom else b""
    expected = [parse_sample(r, "") for r in records]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "CHUNK", chunk)
        path.write_bytes(mark + json.dumps(records, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))
        assert read(path) == expected
        lines = "\n".join(json.dumps(r, ensure_ascii=ascii_only) for r in records)
        path.write_bytes(mark + lines.encode("utf-8", "surrogatepass"))
        assert read(path) == expected


def test_one_object_much_larger_than_a_chunk_is_one_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "CHUNK", 1000)
    big = record("big", None, 'é{["\\' * 5000, "yes")
    small = record("small", None, "why", "so")
    assert [s.id for s in read(write_data(tmp_path / "d.json", [small, big, small]))] == ["small", "big", "small"]
    assert read(tmp_path / "d.json")[1].turns[0][1] == 'é{["\\' * 5000


def test_an_object_without_end_is_refused_and_not_collected_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "CHUNK", 100)
    monkeypatch.setattr(records_module, "LARGEST_RECORD", 1000)
    path = tmp_path / "d.json"
    path.write_text('[{"id": "' + "x" * 5000)
    with pytest.raises(DataError, match="not JSON from byte 1 on"):
        SampleFile(path)


def test_the_key_is_made_of_id_images_and_turns_alone():
    base = record("a", "x.png", "<image>why", "so")
    key = parse_sample(base, "").key
    assert parse_sample({"other": 1, "model": "b", **dict(reversed(base.items()))}, "").key == key
    assert parse_sample({**base, "image": ["x.png"]}, "").key == key
    turns = base["conversations"]
    others = [
        {**base, "id": "b"},
        {**base, "image": "y.png"},
        {**base, "conversations": turns[:1]},
        {**base, "conversations": [turns[0], {**turns[1], "value": "so."}]},
        {**base, "conversations": [turns[0], {**turns[1], "from": "human"}]},
    ]
    assert len({key, *(parse_sample(other, "").key for other in others)}) == 6


@settings(max_examples=200)
@given(TEXTS, st.lists(TEXTS.filter(bool), max_size=3), st.lists(TEXTS, min_size=1, max_size=3))
def test_the_key_is_the_sha256_of_compact_json(name, images, texts):
    texts = [text.replace("<image>", "") for text in texts]
    sample = parse_sample(record(name, images, "<image>" * len(images), *texts), "")
    content = json.dumps([sample.id, sample.images, sample.turns], ensure_ascii=False, separators=(",", ":"))
    assert sample.key == hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def test_an_id_may_be_a_number():
    assert parse_sample(record(7, None, "a", "b"), "").id == "7"


GOOD = json.dumps(record("good", None, "a", "b"))


def _list(text: str) -> str:
    return f"[{GOOD}, {text}]"


MALFORMED = {
    "text": ("hello", ["begins with b'h'", "JSON list or JSON lines"]),
    "empty file": ("", ["is empty", "expected a JSON list or JSON lines"]),
    "space alone": (" \n", ["is empty"]),
    "an object over several lines": ('{\n"data": [\n]\n}', ["none of its 4 records can be read", "a JSON list or one a line"]),
    "empty list": ("[]", ["holds no samples"]),
    "object at the top": ('{"data": []}', ["record 0", "'conversations' is None", "expected a list"]),
    "list cut short": (_list(GOOD)[:-9], ["not JSON from byte", "cut short"]),
    "list without its end": (_list(GOOD)[:-1], ["not JSON from byte", "cut short"]),
    "broken object in a list": (_list('{"id": nope}'), ["not JSON from byte", str(len(GOOD) + 3)]),
    "missing comma": (f"[{GOOD} {GOOD}]", ["a comma is missing or too many at byte", str(len(GOOD) + 1)]),
    "two commas": (f"[{GOOD},, {GOOD}]", ["not JSON from byte", str(len(GOOD) + 2)]),
    "comma before the first": (f"[, {GOOD}]", ["a comma is missing or too many at byte 1"]),
    "comma before the end": (f"[{GOOD}, ]", ["not JSON from byte"]),
    "text after the list": (f"[{GOOD}]\n{GOOD}", [f"the list ends at byte {len(GOOD) + 2}, but more follows"]),
    "second list": (f"[{GOOD}] [{GOOD}]", ["the list ends at byte", "but more follows"]),
    "utf-16": (None, ["expected a JSON list or JSON lines"]),
    "bytes that are no utf-8": (b"[" + GOOD.encode().replace(b'"a"', b'"\xff\xfe"') + b"]", ["record 0", "not JSON"]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_with_file_record_and_what_was_expected(tmp_path, name):
    text, parts = MALFORMED[name]
    path = tmp_path / "broken.json"
    path.write_bytes(text if isinstance(text, bytes) else GOOD.encode("utf-16") if text is None else text.encode())
    with pytest.raises(DataError) as error:
        SampleFile(path)
    for part in ["broken.json", *parts]:
        assert part in str(error.value)


REJECTED = {
    "number": ("3", ["found a number", "expected an object"]),
    "null": ("null", ["found null"]),
    "list": ("[]", ["found a list"]),
    "no conversations": ('{"id": "q"}', ["'conversations' is None", "expected a list of turns"]),
    "empty conversations": ('{"id": "q", "conversations": []}', ["expected a list of turns"]),
    "conversations no list": ('{"id": "q", "conversations": "hello"}', ["'conversations' is 'hello'"]),
    "turn no object": ('{"id": "q", "conversations": [["human", "a"]]}', ["turn ['human', 'a']"]),
    "wrong speaker": (GOOD.replace("gpt", "tool").replace("good", "q"), ["'tool'", "'from': 'human', 'gpt' or 'system'"]),
    "function turn": (GOOD.replace("human", "function").replace("good", "q"), ["'function'"]),
    "speaker no text": (GOOD.replace('"gpt"', "[]").replace("good", "q"), ["'from': []"]),
    "value no text": (GOOD.replace('"b"', "5").replace("good", "q"), ["5", "'value': text"]),
    "value null": (GOOD.replace('"b"', "null").replace("good", "q"), ["'value': None"]),
    "tags over turns": (json.dumps(record("q", "x", "<image>", "a", "<image>", "b")), ["2 <image>", "1 images"]),
    "more images": (json.dumps(record("q", ["x", "y"], "<image>", "b")), ["1 <image>", "2 images"]),
    "empty image with a tag": (json.dumps(record("q", "", "<image>", "b")), ["1 <image>", "0 images"]),
    "image no path": (json.dumps(record("q", 5, "<image>", "b")), ["'image' is 5", "a path or a list"]),
    "image without a name": (json.dumps(record("q", ["x", ""], "<image>", "b")), ["'image' is ['x', '']"]),
    "video file": (
        json.dumps({**record("q", None, "<video>", "b"), "video": "x.mp4"}),
        ["take frames from a video file first"],
    ),
    "no utf-8": (GOOD.encode().replace(b'"a"', b'"\xff\xfe"'), ["not JSON", "utf-8"]),
    "nested too deeply": (f'{{"id": "q", "x": {"[" * 5000}"{{]\\""{"]" * 5000}}}', ["nested too deeply"]),
    "too long a number": (f'{{"id": "q", "x": {"1" * 5000}}}', ["not JSON", "4300"]),
}


@pytest.mark.parametrize("chunk", [7, 2**22])
@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
@pytest.mark.parametrize("name", REJECTED)
def test_a_record_that_cannot_be_read_is_a_sample_with_a_fault_and_hides_no_other(tmp_path, monkeypatch, name, lines, chunk):
    monkeypatch.setattr(records_module, "CHUNK", chunk)
    text, parts = REJECTED[name]
    good, bad = GOOD.encode(), text if isinstance(text, bytes) else text.encode()
    path = tmp_path / "d.json"
    path.write_bytes(b"\n".join([good, bad, good]) if lines else b"[" + b", ".join([good, bad, good]) + b"]")
    first, fault, last = read(path)
    assert first == last == parse_sample(json.loads(GOOD), "")
    assert (fault.images, fault.turns) == ((), ())
    assert fault.id in ("q", "")
    for part in ["record 1", *parts]:
        assert part in fault.fault
    assert SampleFile(path).faults == 1


def test_a_line_that_is_no_json_is_rejected_and_the_lines_after_it_are_read(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(f"{GOOD}\n{GOOD[:-9]}\nhello\n{GOOD}\n")
    samples = read(path)
    assert [bool(s.fault) for s in samples] == [False, True, True, False]
    assert "record 2: not JSON" in samples[2].fault


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_a_record_that_is_too_large_is_rejected_by_its_size_and_never_held(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(records_module, "CHUNK", 100)
    monkeypatch.setattr(records_module, "LARGEST_RECORD", 1000)
    monkeypatch.setattr(records_module, "KEPT", 50)
    large = json.dumps({**record("q", None, 'a]["\\' * 500, "b"), "more": [[{"x": []}]]})
    path = tmp_path / "d.json"
    path.write_text("\n".join([GOOD, large, GOOD]) if lines else f"[{GOOD}, {large}, {GOOD}]")
    first, fault, last = read(path)
    assert first.id == last.id == "good"
    assert "bytes, more than the 1,000 a record may have" in fault.fault


def test_the_key_of_a_record_that_cannot_be_read_does_not_depend_on_how_it_is_written(tmp_path):
    bad = {"id": "q", "conversations": [], "é": 1}
    (tmp_path / "a.json").write_text(json.dumps([json.loads(GOOD), bad], indent=2))
    (tmp_path / "b.jsonl").write_text(f"{GOOD}\n{json.dumps(dict(reversed(bad.items())), ensure_ascii=False)}\n")
    assert read(tmp_path / "a.json")[1].key == read(tmp_path / "b.jsonl")[1].key


def test_what_llavas_training_code_reads_is_read_in_the_same_way():
    text = parse_sample(record("a", None, "Which SVG element?", "<image>, with an href"), "")
    assert (text.images, text.turns[1][1]) == ((), "<image>, with an href")
    assert "read as text" in text.note
    for empty in ("", [], None):
        assert parse_sample({**record("a", None, "why", "so"), "image": empty}, "").images == ()
    unused = parse_sample(record("a", "x.png", "What is it?", "a ball"), "")
    assert (unused.images, unused.turns[0][1]) == ((), "What is it?")
    assert "not used" in unused.note
    one = parse_sample(record("a", "x.png", "<image>\nWhat? <image>", "a ball"), "")
    assert (one.images, one.turns[0][1], one.note) == (("x.png",), "<image>\nWhat?", "")


def test_records_that_are_read_otherwise_than_meant_are_counted_in_a_warning(tmp_path, caplog):
    unused = [record(f"{i}", "x.png", "What?", "a ball") for i in range(3)]
    SampleFile(write_data(tmp_path / "d.json", [json.loads(GOOD), *unused]))
    assert "in 3 of 4 records the image is not used: the text has no <image>" in caplog.text


def test_a_named_pipe_a_device_and_a_socket_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"pipe\.json: a named pipe, expected a plain file"):
        SampleFile(tmp_path / "pipe.json")
    with pytest.raises(DataError, match=r"zero\.json: a device, expected a plain file"):
        SampleFile(tmp_path / "zero.json")


@pytest.mark.parametrize("times", [2, 99])
def test_a_fault_of_storage_is_tried_again_and_is_never_the_files(tmp_path, monkeypatch, times):
    path = write_data(tmp_path / "d.json", SAMPLES)
    file, real, failed = SampleFile(path), os.pread, []

    def pread(*arguments):
        if len(failed) < times:
            failed.append(arguments)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(*arguments)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.0)
    if times == 2:
        assert file[1].id == "vqa1"
    else:
        with pytest.raises(TransientError, match=r"d\.json failed 5 times"):
            file[1]


@pytest.mark.parametrize("times", [2, 99])
def test_a_fault_of_storage_while_a_file_is_indexed_begins_it_again(tmp_path, monkeypatch, times):
    path = write_data(tmp_path / "d.json", SAMPLES)
    real, failed = records_module.read_records, []

    def read(*arguments):
        records = real(*arguments)
        yield next(records)
        if len(failed) < times:
            failed.append(arguments)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        yield from records

    monkeypatch.setattr(records_module, "read_records", read)
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.0)
    if times == 2:
        assert [sample.id for sample in read_all(SampleFile(path))] == [r["id"] for r in SAMPLES]
    else:
        with pytest.raises(TransientError, match=r"d\.json failed 5 times"):
            SampleFile(path)


def read_all(file):
    return [file[i] for i in range(len(file))]


@pytest.mark.parametrize("chunk", [1, 2, 3, len(GOOD), len(GOOD) + 1, len(GOOD) + 2])
@pytest.mark.parametrize("name", ["missing comma", "two commas", "comma before the end", "text after the list", "second list"])
def test_what_is_no_json_list_is_refused_over_any_chunk_border(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(records_module, "CHUNK", chunk)
    (tmp_path / "broken.json").write_text(MALFORMED[name][0])
    with pytest.raises(DataError, match=r"comma is missing|more follows|not JSON"):
        SampleFile(tmp_path / "broken.json")


@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_space_around_a_list_is_no_text(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(records_module, "CHUNK", chunk)
    (tmp_path / "d.json").write_text(f"[\n {GOOD}\t,\r\n{GOOD.replace('good', 'two')}\n ]\n \n\t")
    assert [s.id for s in read(tmp_path / "d.json")] == ["good", "two"]


def test_known_samples_are_read_at_their_places_and_compared_with_their_keys(tmp_path):
    path = write_data(tmp_path / "d.json", SAMPLES)
    whole = SampleFile(path)
    some = np.array([4, 1])
    known = SampleFile.known(path, whole.keys[some], whole.starts[some], whole.lengths[some], some)
    assert [known[i].id for i in range(len(known))] == ["text4", "vqa1"]
    swapped = SampleFile.known(path, whole.keys[some[::-1]], whole.starts[some], whole.lengths[some])
    with pytest.raises(DataError, match=r"d\.json, the record at byte \d+: the file has changed since it was indexed"):
        swapped[0]


def test_two_threads_that_open_the_file_at_once_both_read_their_samples(tmp_path, monkeypatch):
    file = SampleFile(write_data(tmp_path / "d.json", SAMPLES))
    opened, about_to_read = threading.Barrier(2, timeout=10), threading.Barrier(2, timeout=10)
    real_open, real_pread = samples_module.open_data_file, os.pread

    def slow_open(path):
        made = real_open(path)
        opened.wait()
        return made

    def slow_pread(*arguments):
        about_to_read.wait()
        return real_pread(*arguments)

    monkeypatch.setattr(samples_module, "open_data_file", slow_open)
    monkeypatch.setattr(os, "pread", slow_pread)
    with ThreadPoolExecutor(2) as pool:
        assert [sample.id for sample in pool.map(file.__getitem__, [1, 4])] == ["vqa1", "text4"]


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.json: No such file"):
        SampleFile(tmp_path / "nothing.json")
    with pytest.raises(DataError, match="directory"):
        SampleFile(tmp_path)


def test_unique_keeps_the_first_of_identical_samples_in_file_order(tmp_path):
    a, b, c = (record(name, None, "a", "b") for name in "abc")
    file = SampleFile(write_data(tmp_path / "d.json", [b, a, b, {**a, "more": 1}, c, b]))
    assert file.unique().tolist() == [0, 1, 4]


def known_order(file: SampleFile) -> list[int]:
    """Samples of one image where the first of them is, text-only samples where they are: by hand."""
    samples = [file[i] for i in range(len(file))]
    first = {}
    places = []
    for i in file.unique().tolist():
        place = first.setdefault(samples[i].images, i) if samples[i].images else i
        places.append((place, i))
    return [i for _, i in sorted(places)]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(["", "x.png", "y.png", "x.png y.png", "y.png x.png"]), st.integers(0, 2)), min_size=1)
)
def test_samples_of_the_same_images_lie_together_where_the_first_is_and_all_others_keep_their_order(tmp_path_factory, picked):
    records = []
    for images, i in picked:
        names = images.split()
        records.append(record(f"{i}", names, "<image>" * len(names) + "why", "so"))
    file = SampleFile(write_data(tmp_path_factory.mktemp("order") / "d.json", records))
    assert file.by_image().tolist() == known_order(file)


def test_without_a_common_image_the_order_is_that_of_the_file(tmp_path):
    file = SampleFile(write_data(tmp_path / "d.json", SAMPLES))
    assert file.by_image().tolist() == list(range(6))


def test_a_sample_file_crosses_processes_with_and_without_an_open_file(tmp_path):
    file = SampleFile(write_data(tmp_path / "d.json", SAMPLES))
    fresh = pickle.loads(pickle.dumps(file))
    assert file[2] == fresh[2]
    assert pickle.loads(pickle.dumps(file))[5] == fresh[5]


VIDEO = {
    "id": "v",
    "image": "still.jpg",
    "video": [["a0.jpg", "a1.jpg"], ["b0.jpg"]],
    "conversations": [
        {"from": "human", "value": "<video>\nand <image> and <video>, which?"},
        {"from": "gpt", "value": "the first"},
    ],
}


def test_frames_of_videos_are_images_in_the_place_of_their_video():
    sample = parse_sample(VIDEO, "here")
    assert sample.images == ("a0.jpg", "a1.jpg", "still.jpg", "b0.jpg")
    assert sample.turns[0][1] == "<image>\n<image>\nand <image> and <image>, which?"
    alone = {**VIDEO, "image": None, "video": ["a0.jpg", "a1.jpg"], "conversations": [{"from": "human", "value": "<video>"}]}
    assert parse_sample(alone, "here").images == ("a0.jpg", "a1.jpg")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": "clip.mp4"}, "take frames from a video file first"),
        ({"video": [[]]}, "expected a list of its frames"),
        ({"video": [["a0.jpg"]]}, "1 <image> and 2 <video> in the text but 1 images and 1 videos"),
        ({"image": None}, "but 0 images and 2 videos"),
    ],
)
def test_a_video_that_does_not_fit_its_text_is_refused_with_both_counts(changes, message):
    with pytest.raises(SampleError, match=message):
        parse_sample({**VIDEO, **changes}, "here")
