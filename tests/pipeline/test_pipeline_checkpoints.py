"""Checkpoints are sealed by content: what differs from what was written is found, named, and passed over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_runs import metrics, student_sha256, train, without_time

from alignkd.errors import CheckpointError, ConfigError
from alignkd.pipeline.training import checkpoints
from alignkd.pipeline.training.checkpoints import RECORD, find_latest, mark_complete, remove_incomplete, remove_oldest
from alignkd.pipeline.training.resume_checks import check_trainer_state


@pytest.fixture(scope="module")
def saved(data, cache, tmp_path_factory):
    """A finished run with checkpoints of its steps 8 and 12, and of step 4."""
    out = tmp_path_factory.mktemp("saved") / "out"
    train(data, cache, out, save_steps=4, save_total_limit=3)
    return out


def copy_of(saved: Path, folder: Path, *left_out: str) -> Path:
    shutil.copytree(saved, folder, ignore=shutil.ignore_patterns("student", "result.json", *left_out))
    return folder


def flip(path: Path, place: int) -> None:
    """Two bytes changed, the size the same."""
    content = bytearray(path.read_bytes())
    for i in (place, place + 1):
        content[i] ^= 0x7F
    path.write_bytes(content)


FILES = [("model.safetensors", -1000), ("optimizer.pt", 200), ("trainer_state.json", 3), ("rng_state.pth", 200)]
FILES += [("scheduler.pt", 100), ("training_args.bin", 100), (RECORD, 40), (RECORD, -60)]


@pytest.mark.parametrize(("file", "place"), FILES)
def test_flipped_bytes_are_found_and_the_last_good_checkpoint_is_used(saved, tmp_path, caplog, file, place):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved / "checkpoints", folder)
    flip(folder / "checkpoint-12" / file, place)
    assert find_latest(folder)[0] == folder / "checkpoint-8"
    assert any("checkpoint skipped" in text and file in text for text in caplog.messages)
    assert f"resume point found: {folder / 'checkpoint-8'}" in caplog.messages


def test_a_run_goes_on_from_the_good_checkpoint_to_the_same_student(saved, data, cache, tmp_path):
    out = copy_of(saved, tmp_path / "out")
    flip(out / "checkpoints" / "checkpoint-12" / "model.safetensors", -1000)
    train(data, cache, out, save_steps=4, save_total_limit=3, resume=True)
    assert student_sha256(out) == student_sha256(saved)
    assert without_time(metrics(out)) == without_time(metrics(saved))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]


def test_without_a_good_checkpoint_nothing_is_removed_and_all_are_named(saved, data, cache, tmp_path):
    out = copy_of(saved, tmp_path / "out", "checkpoint-4")
    for step in (8, 12):
        flip(out / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt", 200)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: .*checkpoint-12 .*optimizer.*checkpoint-8 "):
        train(data, cache, out, save_steps=4, resume=True)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["checkpoint-12", "checkpoint-8"]


def sealed(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    mark_complete(folder, {"metrics": {}})
    return folder


def test_a_record_of_another_version_counts_as_damaged_and_stays(tmp_path):
    folder = sealed(tmp_path / "checkpoint-3", weights=b"1")
    (folder / RECORD).write_text(json.dumps({"files": {"weights": 1}, "state": {}}))
    with pytest.raises(CheckpointError, match="of another version of alignkd"):
        find_latest(tmp_path)
    assert folder.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_a_record_that_names_files_elsewhere_is_damaged(tmp_path, name):
    (tmp_path / "secret").write_bytes(b"1")
    folder = sealed(tmp_path / "checkpoint-3", weights=b"1")
    record = json.loads((folder / RECORD).read_text())
    record.pop("seal")
    record["files"][name], record["sha256"][name] = 1, checkpoints._sha256(tmp_path / "secret")
    (folder / RECORD).write_text(json.dumps({**record, "seal": checkpoints._seal(record)}))
    with pytest.raises(CheckpointError, match="lies outside of it"):
        find_latest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"seal": 1}', b"\xff"])
def test_any_damaged_record_is_one_message(tmp_path, content):
    (sealed(tmp_path / "checkpoint-3", weights=b"1") / RECORD).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        find_latest(tmp_path)


OTHERS = ("checkpoint-best", "checkpoint-5-keep", "checkpoint-007", "checkpoint-", "checkpoint-5.bak", "mine")


def test_folders_of_the_user_are_neither_used_nor_removed(tmp_path):
    for name in OTHERS:
        sealed(tmp_path / name, weights=b"of the user")
    outside = sealed(tmp_path / "elsewhere" / "checkpoint-9", weights=b"1")
    (tmp_path / "checkpoint-9").symlink_to(outside)
    for step in (1, 2, 10):
        sealed(tmp_path / f"checkpoint-{step}", weights=b"1")
    (tmp_path / "checkpoint-11").mkdir()
    assert find_latest(tmp_path)[0] == tmp_path / "checkpoint-10"
    remove_incomplete(tmp_path)
    remove_oldest(tmp_path, keep=2)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {*OTHERS, "elsewhere", "checkpoint-9", "checkpoint-2", "checkpoint-10"}
    assert (outside / "weights").exists()


def test_a_run_keeps_the_users_folders_beside_its_checkpoints(data, cache, tmp_path):
    kept = tmp_path / "out" / "checkpoints" / "checkpoint-1-keep"
    kept.mkdir(parents=True)
    train(data, cache, tmp_path / "out", max_steps=4, save_steps=1)
    names = sorted(path.name for path in kept.parent.iterdir())
    assert names == ["checkpoint-1-keep", "checkpoint-3", "checkpoint-4"]


def test_without_its_settings_a_run_is_not_resumed(saved, data, cache, tmp_path):
    out = copy_of(saved, tmp_path / "out", "run.json")
    with pytest.raises(CheckpointError, match=r"run\.json is missing"):
        train(data, cache, out, save_steps=4, resume=True)
    (out / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"run\.json is missing"):
        train(data, cache, out, save_steps=4, resume=True)


@pytest.mark.parametrize("name", ["checkpoints", "student", "metrics.jsonl"])
def test_parts_of_a_run_that_lead_elsewhere_are_refused(data, cache, tmp_path, name):
    (tmp_path / "precious").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match=f"{name} leads to .*precious, outside of this folder"):
        train(data, cache, tmp_path / "out", resume=True)


ABSURD = {
    "another step": {"global_step": 7},
    "a step that is a text": {"global_step": "12"},
    "a step that is true": {"global_step": True},
    "fewer steps than made": {"max_steps": 3},
    "more steps than there are numbers": {"max_steps": 10**30},
    "a batch that is no number": {"train_batch_size": "all"},
    "an epoch that is infinite": {"epoch": float("inf")},
    "operations that are none": {"total_flos": float("nan")},
    "a log that is an object": {"log_history": {}},
    "a log of texts": {"log_history": ["a"]},
    "callbacks that are a list": {"stateful_callbacks": []},
    "a best checkpoint": {"best_model_checkpoint": "/etc"},
    "an unknown field": {"__class__": "os.system"},
}


@pytest.mark.parametrize("change", ABSURD.values(), ids=ABSURD)
def test_an_absurd_state_of_the_trainer_is_refused(saved, tmp_path, change):
    state = json.loads((saved / "checkpoints" / "checkpoint-12" / "trainer_state.json").read_text())
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps(state))
    check_trainer_state(path, 12)
    path.write_text(json.dumps({**state, **change}))
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is damaged or was made by hand"):
        check_trainer_state(path, 12)


@pytest.mark.parametrize("content", ["", "[]", "null", "7", "{", "[" * 100_000])
def test_a_state_of_the_trainer_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "trainer_state.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is damaged"):
        check_trainer_state(path, 12)
