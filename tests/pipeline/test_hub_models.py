"""Models by name: found in the local Hugging Face cache, fetched from a Hub, pinned, refused with what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
from hub_server import serving
from tiny_runs import (
    SAMPLES,
    STUDENT,
    TEACHER,
    content,
    copy_checkpoint,
    run_record,
    train,
    wait_until,
    write_cache,
    write_data,
)

from alignkd.cli import UserError, main
from alignkd.errors import CheckpointError, ConfigError, TransientError
from alignkd.pipeline.hub.download import chosen_files
from alignkd.pipeline.hub.models import is_here, model_folder, pin_model
from alignkd.pipeline.hub.names import ModelName, parse_name
from alignkd.pipeline.hub.snapshots import TOWER_SETTINGS

FETCH = "import sys; from alignkd.pipeline.hub.models import pin_model; print(pin_model(sys.argv[1], may_download=True))"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return copy_checkpoint(TEACHER, tmp_path_factory.mktemp("checkpoint") / "teacher")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return copy_checkpoint(STUDENT, tmp_path_factory.mktemp("checkpoint") / "student")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process takes for the real one, and an empty local cache."""
    constants = huggingface_hub.constants
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)  # what has come of a chunk when the connection breaks goes
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


def fetching(hub, cache, name="org/tiny"):
    environment = {**os.environ, **hub.environment(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, name], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mtgv/MobileVLM_V2-7B", ModelName("mtgv/MobileVLM_V2-7B")),
        ("a/b@v1.0", ModelName("a/b", "v1.0")),
        ("a/b@refs/pr/1", ModelName("a/b", "refs/pr/1")),
        *(
            (text, None)
            for text in ("model", "./a/b", "/a/b", "~/b", "a/b/c", "a/b/", "a\\b", "a/..", "a/b@../../c", "s3://a/b")
        ),
    ],
)
def test_a_name_is_an_organisation_and_a_model_and_anything_else_is_a_path(text, expected):
    assert parse_name(text) == expected


def test_weights_are_fetched_as_safetensors_where_there_are_any_and_code_never():
    listed = ["config.json", "model.safetensors", "pytorch_model.bin", "modeling.py", "a.pkl", "onnx/model.onnx", "x.msgpack"]
    assert chosen_files([*listed, "clip/config.json", "clip/run.py", "../up.json", "b/c.json"]) == (
        ["clip/config.json", "config.json"],
        ["model.safetensors"],
    )
    assert chosen_files(["config.json", "pytorch_model.bin", "tokenizer.model"]) == (
        ["config.json", "tokenizer.model"],
        ["pytorch_model.bin"],
    )


def test_a_folder_wins_over_a_name(hub, checkpoint, tmp_path, monkeypatch):
    hub.add("org/tiny", checkpoint)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert pin_model("org/tiny", may_download=True) == "org/tiny"
    assert str(model_folder("org/tiny")) == "org/tiny"
    assert hub.requests == []


def test_what_looks_like_a_missing_path_stays_a_path(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/student", "./a/b", str(tmp_path / "gone"), "gone"):
        assert pin_model(path) == path
        assert str(model_folder(path)) == path.removeprefix("./")


def test_a_model_is_fetched_once_without_its_code_and_named_with_its_commit(hub, checkpoint):
    commit = hub.add("org/tiny", checkpoint, **{"modeling_tiny.py": b"raise SystemExit", "README.md": b"# tiny"})
    hub.cut = {"pytorch_model.bin"}
    assert pin_model("org/tiny", may_download=True) == f"org/tiny@{commit}"
    folder = model_folder("org/tiny")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert (folder / "pytorch_model.bin").read_bytes() == (checkpoint / "pytorch_model.bin").read_bytes()
    size = (checkpoint / "pytorch_model.bin").stat().st_size
    first, second = hub.fetched(f"tiny/resolve/{commit}/pytorch_model.bin")
    assert first is None
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= size // 2
    assert not [path for _, path, _ in hub.requests if path.endswith((".py", ".md"))]
    hub.requests.clear()
    assert pin_model("org/tiny") == pin_model("org/tiny", may_download=True) == f"org/tiny@{commit}"
    assert model_folder(f"org/tiny@{commit}") == folder
    assert hub.requests == []


def test_a_run_that_goes_on_keeps_its_commit_when_the_branch_has_moved(hub, checkpoint):
    first = hub.add("org/tiny", checkpoint)
    assert pin_model("org/tiny", may_download=True) == f"org/tiny@{first}"
    second = hub.add("org/tiny", checkpoint, **{"added_tokens.json": b"{}"})
    assert pin_model("org/tiny@main", may_download=True) == f"org/tiny@{first}"  # what is here whole is not asked for
    assert pin_model(f"org/tiny@{second}", may_download=True) == f"org/tiny@{second}"
    huggingface_hub.snapshot_download("org/tiny", allow_patterns=["config.json"])  # another tool moves the local branch
    assert pin_model("org/tiny") == f"org/tiny@{second}"
    assert pin_model("org/tiny", recorded=f"org/tiny@{first}") == f"org/tiny@{first}"
    assert pin_model("org/tiny@main", recorded=f"org/tiny@{first}") == f"org/tiny@{second}"
    assert pin_model("org/tiny", recorded=f"org/other@{first}") == f"org/tiny@{second}"


def test_what_is_here_is_a_folder_or_a_whole_snapshot(hub, checkpoint, tmp_path):
    hub.add("org/tiny", checkpoint)
    assert is_here(str(checkpoint))
    assert not is_here("org/tiny")
    assert not is_here(str(tmp_path / "gone"))
    huggingface_hub.snapshot_download("org/tiny", allow_patterns=["config.json"])
    assert not is_here("org/tiny")
    assert is_here(pin_model("org/tiny", may_download=True))


def test_a_model_that_is_not_here_is_refused_with_the_commands_that_bring_it(hub):
    with pytest.raises(CheckpointError) as refused:
        pin_model("org/tiny@v2")
    message = str(refused.value)
    assert "add --download" in message
    assert "hf download org/tiny --revision v2 --local-dir tiny" in message
    assert huggingface_hub.constants.HF_HUB_CACHE in message
    assert hub.requests == []


def test_another_commit_in_the_cache_is_named(hub, checkpoint):
    commit = hub.add("org/tiny", checkpoint)
    pin_model(f"org/tiny@{commit}", may_download=True)
    with pytest.raises(CheckpointError, match=f"it holds org/tiny@{commit}"):
        pin_model("org/tiny@v2")


def test_an_incomplete_snapshot_is_named_with_what_it_lacks_and_completed(hub, checkpoint):
    commit = hub.add("org/tiny", checkpoint)
    huggingface_hub.snapshot_download("org/tiny", allow_patterns=["config.json"])
    with pytest.raises(CheckpointError, match=rf"lacks model\.safetensors .*, tokenizer\.json .*--revision {commit}"):
        pin_model("org/tiny")
    with pytest.raises(CheckpointError, match="is not complete"):
        model_folder("org/tiny")
    assert pin_model("org/tiny", TOWER_SETTINGS) == f"org/tiny@{commit}"
    assert pin_model("org/tiny", may_download=True) == f"org/tiny@{commit}"
    (model_folder("org/tiny") / "pytorch_model.bin").resolve().unlink()
    with pytest.raises(CheckpointError, match=r"lacks pytorch_model\.bin\."):
        pin_model("org/tiny")


def test_shards_that_the_index_names_are_looked_for(hub, checkpoint, tmp_path):
    sharded = shutil.copytree(checkpoint, tmp_path / "sharded")
    (sharded / "pytorch_model.bin").rename(sharded / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    hub.add("org/tiny", sharded)
    huggingface_hub.snapshot_download("org/tiny")
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors\."):
        pin_model("org/tiny")


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (401, "RepoNotFound", CheckpointError, "does not exist, or is private"),
        (404, "RepoNotFound", CheckpointError, "does not exist, or is private"),
        (403, "", CheckpointError, "does not exist, or is private"),
        (403, "GatedRepo", CheckpointError, "is gated: accept its terms"),
        (404, "RevisionNotFound", CheckpointError, "has no revision 'main'"),
        (500, "", TransientError, "answered HTTP 500; run the same command again"),
    ],
)
def test_a_hub_that_refuses_gives_one_message(hub, status, code, kind, words):
    hub.refuse = (status, code)
    with pytest.raises(kind, match=words):
        pin_model("org/tiny", may_download=True)


def test_without_network_the_message_says_how_to_bring_the_model(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set.*hf download org/tiny"):
        pin_model("org/tiny", may_download=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"127\.0\.0\.1:9 cannot be reached.*hf download org/tiny"):
        pin_model("org/tiny", may_download=True)


def test_a_repository_without_weights_is_refused(hub, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "config.json").write_text("{}")
    hub.add("org/data", tmp_path / "data")
    with pytest.raises(CheckpointError, match="holds no weights that alignkd reads"):
        pin_model("org/data", may_download=True)


@pytest.mark.processes
def test_processes_that_start_together_fetch_a_file_once_and_a_killed_one_keeps_what_it_has(hub, checkpoint, tmp_path):
    commit = hub.add("org/tiny", checkpoint)
    hub.hold = {"pytorch_model.bin"}
    killed = fetching(hub, tmp_path / "home")
    wait_until(lambda: hub.fetched(f"tiny/resolve/{commit}/pytorch_model.bin"))
    killed.kill()
    killed.communicate()
    hub.hold, requests = set(), list(hub.requests)
    hub.go.set()
    with pytest.raises(CheckpointError, match="is not complete"):
        pin_model("org/tiny")
    both = [fetching(hub, tmp_path / "home") for _ in range(2)]
    outputs = [one.communicate() for one in both]
    assert [out.strip() for out, _ in outputs] == [f"org/tiny@{commit}"] * 2, outputs
    small = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path and ".bin" not in path]
    assert len(set(small)) == len(small) > 3
    again = hub.requests[len(requests) :]
    got = [path for method, path, _ in again if method == "GET" and path.endswith(f"{commit}/pytorch_model.bin")]
    assert len(got) == 1


def test_a_name_and_a_folder_give_the_same_cache_and_the_commit_is_recorded(hub, checkpoint, tmp_path):
    commit = hub.add("org/tiny", checkpoint)
    data = write_data(tmp_path / "data.json", SAMPLES[:2])
    write_cache(data, tmp_path / "by-folder", teacher=str(checkpoint))
    write_cache(data, tmp_path / "by-name", teacher="org/tiny", download=True)
    assert content(tmp_path / "by-name") == content(tmp_path / "by-folder")
    assert (tmp_path / "by-name" / "cache.json").read_bytes() == (tmp_path / "by-folder" / "cache.json").read_bytes()
    assert run_record(tmp_path / "by-name")["configuration"]["teacher"] == f"org/tiny@{commit}"
    assert write_cache(data, tmp_path / "by-folder", teacher="org/tiny")["new_samples"] == 0


def test_a_cache_that_goes_on_keeps_the_commit_of_its_teacher(hub, checkpoint, tmp_path):
    first = hub.add("org/tiny", checkpoint)
    data = write_data(tmp_path / "data.json", SAMPLES[:2])
    write_cache(data, tmp_path / "cache", teacher="org/tiny", download=True)
    second = hub.add("org/tiny", checkpoint, **{"README.md": b"# tiny"})
    pin_model(f"org/tiny@{second}", may_download=True)
    huggingface_hub.snapshot_download("org/tiny", allow_patterns=["config.json"])
    assert pin_model("org/tiny") == f"org/tiny@{second}"
    write_cache(data, tmp_path / "cache", teacher="org/tiny")
    records = [json.loads(path.read_text())["configuration"] for path in (tmp_path / "cache" / "runs").glob("*.json")]
    assert {record["teacher"] for record in records} == {f"org/tiny@{first}"}


@pytest.mark.slow
def test_a_student_is_trained_by_name_and_resumed_at_the_same_commit(hub, student, data, cache, tmp_path):
    commit = hub.add("org/small", student)
    out = tmp_path / "run"
    train(data, cache, out, student="org/small", download=True, max_steps=2)
    record = json.loads((out / "run.json").read_text())["configuration"]
    assert record["student"] == f"org/small@{commit}"
    other = hub.add("org/small", student, **{"added_tokens.json": b"{}"})
    pin_model(f"org/small@{other}", may_download=True)
    huggingface_hub.snapshot_download("org/small", allow_patterns=["config.json"])
    assert train(data, cache, out, student="org/small", max_steps=2, resume=True)["steps"] == 2
    with pytest.raises(ConfigError, match=f"student: 'org/small@{commit}' before, 'org/small@{other}' now"):
        train(data, cache, out, student="org/small@main", max_steps=2, resume=True)


def test_every_command_says_at_once_that_a_model_is_not_here(hub, data, tmp_path):
    commands = [
        ("cache-teacher", "--teacher", "org/none", "--data", data, "--cache", tmp_path / "cache"),
        ("distill", "--student", "org/none", "--data", data, "--out", tmp_path / "run", "--recipe", "sft"),
        ("distill", "--student", STUDENT, "--online-teacher", "org/none", "--data", data, "--out", tmp_path / "run"),
        ("evaluate", "--model", "org/none", "--data", data),
        ("show", "--model", STUDENT, "--vision-tower", "org/none", "--data", data),
        ("chat", "org/none", "--prompt", "Hello"),
    ]
    for command in commands:
        with pytest.raises(UserError) as refused:
            main([str(word) for word in command], standalone_mode=False)
        assert refused.value.exit_code == 2
        assert "org/none is not a folder, and the local Hugging Face cache" in refused.value.message, command
        assert "hf download org/none --revision main --local-dir none" in refused.value.message, command
