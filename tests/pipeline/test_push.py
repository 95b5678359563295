"""The model card beside every student, and students published with it: to a folder, or to a Hub on loopback."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch
import yaml
from benchmark_outs import write_out
from hub_server import serving
from transformers import AutoModelForImageTextToText

from alignkd.cli import UserError, main
from alignkd.errors import CheckpointError, ConfigError
from alignkd.models.loading import load_vlm
from alignkd.pipeline.hub.card import Card, CardScore
from alignkd.pipeline.hub.card_text import licence_in, short_name
from alignkd.pipeline.hub.models import model_folder, pin_model


@pytest.fixture(scope="module")
def ended(run, tmp_path_factory):
    """A copy of a run, whose student's folder also holds a file of its user."""
    copy = tmp_path_factory.mktemp("ended") / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    (copy / "student" / "notes.py").write_text("secret = 'hf_abcdefghijklmnopqrstuvwx'")
    return copy


def alignkd(*words):
    main([str(word) for word in words], standalone_mode=False)


def printed(capsys):
    return json.loads(capsys.readouterr().out)


def head_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def same_weights(first, second):
    states = [load_vlm(folder).model.state_dict() for folder in (first, second)]
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_training_writes_a_card_beside_each_student(run):
    for name in ("student", "student-official"):
        card = (run / name / "README.md").read_text()
        assert head_of(card)["library_name"] == "alignkd"
        assert "license" not in head_of(card)
        assert "**The licence is not stated.**" in card
        record = json.loads((run / "run.json").read_text())["configuration"]
        for part in ("recipe `align-kd`", record["data_keys"], record["cache_fingerprint"]["teacher"]["weights"]):
            assert part in card
        assert "* steps: 12\n" in card
        assert "* teacher: " in card  # from the records of the cache; its folder is gone
        assert "| seed | 0 |" in card
        assert str(run.parent) not in card
        assert "samples.json" in card


def test_a_student_written_to_a_folder_loads_with_alignkd_and_with_transformers(ended, tmp_path, capsys):
    write_out(tmp_path / "scores", model=str(ended / "student"), names=("gqa", "pope"))
    (tmp_path / "test").mkdir()
    result = {"metric": "exact", "accuracy": 0.5, "interval_95": [0.25, 0.75], "answered": 4}
    (tmp_path / "test" / "result.json").write_text(json.dumps(result))
    folder = tmp_path / "published"
    scores = ("--benchmarks", tmp_path / "scores", "--benchmarks", tmp_path / "test")
    alignkd("push", ended, "--folder", folder, *scores, "--license", "apache-2.0", "--json")
    figures = printed(capsys)
    assert figures["folder"] == str(folder)
    assert figures["files"] == len(list(folder.iterdir()))
    assert not (folder / "notes.py").exists()
    card = (folder / "README.md").read_text()
    assert head_of(card)["license"] == "apache-2.0"
    assert "licence is not stated" not in card
    rows = [line for line in card.splitlines() if line.startswith(("| GQA", "| POPE", "| test"))]
    assert len(rows) == 3
    assert "| 50.0 % | 25.0 to 75.0 | 4 | metric exact |" in rows[2]
    assert all(" to " in row for row in rows)
    assert str(tmp_path) not in card
    assert same_weights(folder, ended / "student")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), load_vlm(folder).model.parameters(), strict=True))


def test_a_student_in_the_official_layout_is_published_as_it_is(ended, tmp_path):
    alignkd("push", ended, "--official", "--folder", tmp_path / "official")
    assert (tmp_path / "official" / "clip" / "config.json").is_file()
    assert same_weights(tmp_path / "official", ended / "student")


def test_a_pushed_student_can_be_used_by_its_name(ended, tmp_path, monkeypatch, capsys):
    constants = huggingface_hub.constants
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", "hf_" + 20 * "t")
        alignkd("push", ended, "org/small", "--private", "--json")
        commit = hub.repos["org/small"].refs["main"]
        assert printed(capsys)["url"].endswith(commit)
        files = hub.repos["org/small"].commits[commit]
        assert "notes.py" not in files
        assert "alignkd chat org/small --download" in files["README.md"].decode()
        assert pin_model("org/small", may_download=True) == f"org/small@{commit}"
        assert same_weights(model_folder("org/small"), ended / "student")
        hub.refuse = (403, "")
        with pytest.raises(UserError, match="this login may not use it"):
            alignkd("push", ended, "org/small")


def test_a_licence_that_was_filled_in_stays(ended, tmp_path, capsys):
    card = ended / "student-official" / "README.md"
    card.write_text(card.read_text().replace("# license: fill in, such as apache-2.0", "license: mit"))
    alignkd("push", ended, "--official", "--folder", tmp_path / "published", "--json")
    assert printed(capsys)["license"] == "mit"
    assert licence_in((tmp_path / "published" / "README.md").read_text()) == "mit"


def test_a_best_student_says_what_chose_it(ended, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(ended, out)
    shutil.copytree(out / "student", out / "best" / "student")
    best = {"name": "gqa", "value": 61.5, "step": 8}
    monkeypatch.setattr("alignkd.pipeline.training.evaluation.best.read_best", lambda _: best)
    alignkd("push", out, "--best", "--folder", tmp_path / "published")
    card = (tmp_path / "published" / "README.md").read_text()
    assert "best student of its run by gqa: 61.5 at step 8." in card
    assert "* steps: 8\n" in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no REPO is given; give ORG/NAME on the Hugging Face Hub, or --folder DIR"),
        (("small",), "REPO is 'small', expected ORG/NAME"),
        (("org/small@v1",), "--revision names a branch"),
        (("--folder", "FULL"), "is not empty; choose a new folder"),
        (("--best", "--folder", "NEW"), "holds no best student: alignkd distill keeps one with --keep-best"),
        (("--benchmarks", "FULL", "--folder", "NEW"), "holds no benchmark; expected an --out folder"),
    ],
)
def test_what_cannot_be_published_is_refused_and_nothing_is_written(ended, tmp_path, words, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    places = {"FULL": tmp_path / "full", "NEW": tmp_path / "new"}
    with pytest.raises((UserError, ConfigError), match=message):
        alignkd("push", ended, *(places.get(word, word) for word in words))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_run_that_has_not_ended_says_how_it_ends(ended, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(ended, out, ignore=shutil.ignore_patterns("student*", "result.json"))
    with pytest.raises((UserError, CheckpointError), match="continue it with alignkd distill --resume"):
        alignkd("push", out, "--folder", tmp_path / "new")


def test_a_card_shows_no_path_no_secret_and_nothing_that_means_something():
    evil = "|x| <script>`*[a](http://b)\n---\nlicense: mit\u202e"
    settings = {
        "student": f"/home/bob/{evil}",
        "data": ["/home/bob/private/train.json", f"s3://key:secret@bucket/{evil}"],
        "out": "/home/bob/runs/first",
        "template": evil,
        "recipe": {"name": evil, "attention": 0.1},
    }
    record = {"configuration": settings, "versions": {"torch": evil, "platform": "bobs-machine"}}
    score = CardScore(evil, 50.0, "percent", None, 10, evil, "/home/bob/runs/first/student")
    text = Card(record, "llava", {"steps": 3}, teacher=evil, scores=[score]).text()
    assert head_of(text) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["alignkd", "knowledge-distillation", "vision-language-model"],
    }
    for hidden in ("/home", "bob", "secret", "key:", "<script>", "\u202e", "\nlicense: mit"):
        assert hidden not in text, hidden
    table = next(line for line in text.splitlines() if "50.0 %" in line)
    assert table.replace("\\|", "").count("|") == 7


def test_names_of_the_hub_stay_whole_and_paths_lose_their_folders():
    commit = "0" * 40
    assert short_name(f"mtgv/MobileVLM_V2-7B@{commit}") == f"mtgv/MobileVLM_V2-7B@{commit}"
    assert short_name("/home/bob/models/MobileVLM_V2-7B") == "MobileVLM_V2-7B"
    assert short_name("bob/MobileVLM_V2-7B") == "MobileVLM_V2-7B"
    assert short_name("/home/bob/runs/first/student") == "first/student"
    assert short_name("/home/bob/student") == "student"
    assert short_name("s3://bucket/caches/short") == "short"
    assert short_name("C:\\Users\\bob\\train.json") == "train.json"


def test_a_card_names_every_cache_and_dataset():
    caches = [{"teacher": {"weights": digit * 64}, "data": digit} for digit in "12"]
    settings = {"cache_fingerprint": caches, "data": ["/a/one.json", "/b/two.parquet"], "data_weight": [1.0, 0.5]}
    lines = Card({"configuration": settings}, "llava").text().splitlines()
    assert f"* teacher's weights, SHA-256: {'1' * 64}, {'2' * 64}" in lines
    assert "* data: one.json, two.parquet" in lines
    assert "* weights of the data: \\[1.0, 0.5\\]" in lines
    assert next(len(line.split(", ")) for line in lines if "cache fingerprint" in line) == 3


def test_a_base_model_and_data_of_the_hub_stand_in_the_head():
    settings = {"student": f"mtgv/MobileVLM_V2-1.7B@{'0' * 40}", "data": "hf://datasets/org/data@main/train.json"}
    head = head_of(Card({"configuration": settings}, "mobilevlm_v2").text())
    assert head["base_model"] == "mtgv/MobileVLM_V2-1.7B"
    assert head["datasets"] == ["org/data"]
