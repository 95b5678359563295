"""What a user can get wrong: exit code 2, one message that says what to do, no traceback."""

from __future__ import annotations

import shutil

import pytest
from tiny_runs import (
    GOLDEN_SAMPLES,
    IMAGES,
    SAMPLES,
    STUDENT,
    TEACHER,
    copy_checkpoint,
    record,
    with_other_weights,
    with_vocabulary,
    write_data,
)
from tiny_runs import (
    with_file as changed_file,
)


def without_tokenizer(folder):
    copy_checkpoint(STUDENT, folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return folder


def without_weights(folder):
    copy_checkpoint(STUDENT, folder)
    (folder / "pytorch_model.bin").unlink()
    return folder


def with_broken_weights(folder):
    copy_checkpoint(STUDENT, folder)
    (folder / "pytorch_model.bin").write_bytes((STUDENT / "pytorch_model.bin").read_bytes()[:5000])
    return folder


def with_file(path, text):
    path.write_text(text)
    return path


def with_flipped_byte(cache, folder):
    shutil.copytree(cache, folder)
    shard = sorted((folder / "shards").iterdir())[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return folder


WITHOUT_CONVERSATIONS = '[{"id": "q", "image": "0.png"}]'
MANY_MISSING = [record(f"s{i}", f"{i}.png", "<image>\nWhat?", "This.") for i in range(200, 303)]

CASES = {
    "a folder that is no checkpoint": (lambda t: {"--student": t}, ["is not a checkpoint", "config.json"]),
    "a folder that is not there": (lambda t: {"--student": t / "none"}, ["none is not a folder"]),
    "a family that is not known": (
        lambda t: {"--student": copy_checkpoint(STUDENT, t / "s", model_type="llama")},
        ["model_type is 'llama'", "no vision-language model"],
    ),
    "an unknown projector": (
        lambda t: {"--student": copy_checkpoint(STUDENT, t / "s", mm_projector_type="mlp2x_gelu")},
        ["mm_projector_type", "mlp2x_gelu", "ldpnetv2"],
    ),
    "no tokenizer": (lambda t: {"--student": without_tokenizer(t / "s")}, ["holds no tokenizer", "tokenizer.model"]),
    "no weights": (lambda t: {"--student": without_weights(t / "s")}, ["weights"]),
    "weights cut short": (lambda t: {"--student": with_broken_weights(t / "s")}, ["pytorch_model.bin"]),
    "a student of another vocabulary": (
        lambda t: {"--student": with_vocabulary(STUDENT, t / "s", 520)},
        ["vocabulary: 512 in the cache, 520 here", "is incompatible with this run", "alignkd cache-teacher"],
    ),
    "a student of another tokenizer": (
        lambda t: {"--student": changed_file(STUDENT, t / "s", "tokenizer_config.json", legacy=False)},
        ["tokenizer: ", "logits need the same tokenizer", "--set reverse_kl=0"],
    ),
    "a cache of another template": (lambda t: {"--template": "plain"}, ["template: v1 in the cache, plain here"]),
    "an unknown template": (lambda t: {"--template": "v7"}, ["'v7'", "plain"]),
    "no cache there": (lambda t: {"--cache": t / "none"}, ["no cache at", "found nothing", "run alignkd cache-teacher"]),
    "no cache given": (lambda t: {"--cache": None}, ["needs attention, logits, vision", "give --cache"]),
    "data that is no data": (lambda t: {"--data": with_file(t / "d.json", "id,image")}, ["JSON list or JSON lines"]),
    "data without conversations": (
        lambda t: {"--data": with_file(t / "d.json", WITHOUT_CONVERSATIONS)},
        ["d.json: none of its 1 records can be read", "record 0 (id 'q')", "expected a list of turns"],
    ),
    "an image too few": (
        lambda t: {"--data": write_data(t / "d.json", [record("q", "", "<image>\nWhat?", "This.")])},
        ["record 0 (id 'q')", "1 <image> in the text but 0 images"],
    ),
    "a sample without a row": (
        lambda t: {"--data": write_data(t / "d.json", [{**SAMPLES[0], "id": "new"}])},
        ["sample 'new' has no row in the cache", "never planned"],
    ),
    "an unknown recipe": (lambda t: {"--recipe": "best"}, ["recipe 'best' is not known", "align-kd", "paper", "sft"]),
    "an unknown field": (lambda t: {"--set": "atention=1"}, ["'atention' is no field of a recipe", "attention"]),
    "a field of another kind": (lambda t: {"--set": "attention=much"}, ["attention is 'much', expected float"]),
    "a field without a value": (lambda t: {"--set": "attention"}, ["--set attention: expected key=value"]),
    "another temperature": (
        lambda t: {"--set": "temperature=2"},
        ["temperature 1.0, but recipe 'align-kd' has temperature 2.0"],
    ),
    "an unknown option": (lambda t: {"--best": "yes"}, ["--best"]),
    "no image folder": (lambda t: {"--images": t / "none"}, ["none does not exist", "give the folder"]),
    "an image folder without the images": (
        lambda t: {"--images": t, "--max-rejected": 2, "--batch-size": 6},
        ["3 samples cannot be used, more than --max-rejected 2 allows", "No such file", "Check --images"],
    ),
    "a device that is not there": (lambda t: {"--device": "warp"}, ["--device warp cannot be used here"]),
    "a GPU where there is none": (lambda t: {"--device": "cuda"}, ["--device cuda cannot be used here"]),
}


def refused(door, arguments, parts):
    finished = door(*arguments)
    assert finished.code == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    assert sum(line.startswith("Error: ") for line in finished.stderr.splitlines()) == 1
    for part in parts:
        assert part in finished.stderr, finished.stderr
    return finished


@pytest.mark.parametrize("name", CASES)
def test_stage_two_refuses_and_says_what_to_do(door, tmp_path, data, cache, name):
    make, parts = CASES[name]
    given = {"--student": STUDENT, "--cache": cache, "--data": data, "--images": IMAGES, "--out": tmp_path / "out"}
    given |= {"--device": "cpu", "--max-steps": 2, "--batch-size": 1} | make(tmp_path)
    refused(door, ["distill", *(x for pair in given.items() if pair[1] is not None for x in pair)], parts)


STAGE_ONE = {
    "another teacher": (
        lambda t: {"--teacher": with_other_weights(TEACHER, t / "other")},
        ["fingerprint.teacher.weights: cache has", "Write to another --cache, or use the settings"],
    ),
    "another template": (lambda t: {"--template": "plain"}, ['template: cache has "v1", wanted "plain"', "another --cache"]),
    "an unknown target": (lambda t: {"--targets": "attention,hidden"}, ["known are attention, vision, logits"]),
    "no images at all": (
        lambda t: {"--data": write_data(t / "d.json", MANY_MISSING), "--cache": t / "cache"},
        [
            "12 samples cannot be used, more than --max-rejected 1% (10 of 103 samples) allows: 12 image missing",
            ".png: No such file",
            "Check --images",
            "--retry-rejected",
        ],
    ),
    "a cache that is a file": (lambda t: {"--cache": with_file(t / "cache", "x")}, ["cache"]),
}


@pytest.mark.parametrize("name", STAGE_ONE)
def test_stage_one_refuses_and_says_what_to_do(door, tmp_path, data, cache, name):
    make, parts = STAGE_ONE[name]
    given = {"--teacher": TEACHER, "--cache": cache, "--data": data, "--images": IMAGES, "--device": "cpu"}
    given |= {"--shard-samples": 2} | make(tmp_path)
    refused(door, ["cache-teacher", *(x for pair in given.items() for x in pair)], parts)


def test_a_dry_run_without_images_says_what_is_missing(door, tmp_path):
    data = write_data(tmp_path / "d.json", MANY_MISSING)
    arguments = ["--teacher", TEACHER, "--data", data, "--images", IMAGES, "--cache", tmp_path / "c", "--device", "cpu"]
    refused(door, ["cache-teacher", "--dry-run", *arguments], ["none of 32 samples tried can be used", "No such file"])


def test_an_id_that_is_not_there_is_refused(door, data, cache):
    arguments = ["--model", STUDENT, "--data", data, "--images", IMAGES, "--device", "cpu"]
    refused(door, ["show", *arguments, "--id", "nobody"], ["holds no sample with id 'nobody'", "its first is 'cap0'"])
    refused(door, ["cache", "inspect", cache, "--id", "nobody"], ["has no row of sample 'nobody'", "6 other samples"])


def test_an_output_file_that_cannot_be_written_is_refused(door, tmp_path, data, cache):
    arguments = ["--model", STUDENT, "--data", data, "--images", IMAGES, "--device", "cpu"]
    refused(door, ["show", *arguments, "--save", tmp_path / "none" / "x.npz"], ["No such file", "x.npz"])
    refused(door, ["cache", "inspect", cache, "--id", "cap0", "--plot", tmp_path / "none" / "x.png"], ["x.png"])
    refused(door, ["cache", "inspect", cache, "--id", "cap0", "--plot", tmp_path / "x.docx"], ["docx", "png"])


def test_pictures_and_arrays_are_of_one_row(door, cache, tmp_path):
    refused(door, ["cache", "inspect", cache, "--save", tmp_path / "x.npz"], ["--save and --plot need --id"])
    refused(door, ["cache", "inspect", cache, "--id", "text4", "--plot", tmp_path / "x.png"], ["no attention to draw"])


@pytest.mark.parametrize("command", ["status", "verify", "inspect"])
def test_a_folder_that_is_no_cache_is_refused(door, tmp_path, command):
    refused(door, ["cache", command, tmp_path], ["no cache at", "found nothing", "run alignkd cache-teacher"])
    refused(door, ["cache", command, IMAGES], ["no cache at", "found 0.png, 1.png"])


def test_a_damaged_shard_is_found_by_verify_and_ends_distill(door, tmp_path, data, cache):
    damaged = with_flipped_byte(cache, tmp_path / "cache")
    verified = door("cache", "verify", damaged)
    assert verified.code == 2
    assert "problem: shard 0 of the cache" in verified.stdout
    assert "found crc32" in verified.stdout
    assert "Traceback" not in verified.stderr
    arguments = ["--student", STUDENT, "--data", data, "--images", IMAGES, "--device", "cpu", "--batch-size", 6]
    words = ["shard 0 of the cache", "expected", f"alignkd cache repair {damaged}"]
    refused(door, ["distill", *arguments, "--cache", damaged, "--out", tmp_path / "out"], words)


def test_evaluate_refuses_what_it_cannot_answer(door, tmp_path):
    data = write_data(tmp_path / "d.json", GOLDEN_SAMPLES)
    arguments = ["evaluate", "--model", STUDENT, "--data", data, "--device", "cpu", "--images", tmp_path]
    refused(door, [*arguments, "--max-rejected", 1], ["2 samples cannot be used, more than --max-rejected 1", "0.png"])


def test_a_demo_folder_that_is_taken_is_refused(door, tmp_path):
    (tmp_path / "result.json").write_text("{}")
    refused(door, ["demo", "--out", tmp_path], ["already holds a demo; choose another folder, or remove it"])


def test_debug_shows_the_traceback(door, tmp_path):
    finished = door("--debug", "cache", "status", tmp_path)
    assert finished.code == 1
    assert "Traceback" in finished.stderr


@pytest.mark.parametrize("out", ["file", "file/below/it"])
@pytest.mark.parametrize("command", ["distill", "evaluate", "demo"])
def test_an_output_folder_that_a_file_is_in_the_way_of_is_refused_before_the_work(door, tmp_path, data, cache, command, out):
    (tmp_path / "file").write_text("mine")
    inputs = ["--data", data, "--images", IMAGES, "--device", "cpu"]
    given = {
        "distill": ["--student", STUDENT, "--cache", cache, *inputs],
        "evaluate": ["--model", STUDENT, *inputs],
        "demo": [],
    }
    refused(door, [command, *given[command], "--out", tmp_path / out], ["cannot be a folder", f"{tmp_path / 'file'} is a file"])
    assert (tmp_path / "file").read_text() == "mine"
