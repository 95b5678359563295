"""Credentials reach no file that a run writes, no message and no figure."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import IMAGES, STUDENT, TEACHER

from alignkd.pipeline.runtime.redact import REMOVED, redacted, redacted_text

SECRET = "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY"

LEAKS = {
    "user of a URL": f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@bucket/cache",
    "a slash in a password": f"s3://user:a/{SECRET}@bucket/cache",
    "a question mark in a password": f"https://user:a?{SECRET}@host/x",
    "an @ in a password": f"https://user:a@{SECRET}@host/x",
    "a user alone": f"https://{SECRET}@host/x",
    "a presigned URL": f"https://host/x?X-Amz-Credential=a%2Fb&X-Amz-Signature={SECRET}",
    "Google's": f"https://storage.googleapis.com/b/x?X-Goog-Signature={SECRET}",
    "Azure's": f"https://a.blob.core.windows.net/c/x?sv=2024&sig={SECRET}",
    "an access token after #": f"https://host/x#access_token={SECRET}",
    "a chain of file systems": f"filecache::s3://user:{SECRET}@bucket/x",
    "an archive at a URL": f"zip://a/b.zip::https://host/x.zip?token={SECRET}",
    "an address in brackets": f"http://[::1]:9000/x?token={SECRET}",
    "inside a sentence": f"cannot open --cache s3://user:{SECRET}@bucket/x: OSError. Check it",
    "in an assignment": f"AWS_SECRET_ACCESS_KEY={SECRET} alignkd distill",
    "in an option": f"--hf-token={SECRET}",
    "of a connection string": f"AccountName=a;AccountKey={SECRET}==;EndpointSuffix=x",
    "in JSON": json.dumps({"key": "a", "secret": SECRET}),
    "a query without a URL": f"bucket/x?X-Amz-Signature={SECRET}&X-Amz-Date=1",
    "in a header": f"Authorization: Bearer {SECRET}1",
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_text_loses_its_secret_and_keeps_the_rest(name):
    text = redacted_text(LEAKS[name])
    assert SECRET not in text
    assert text
    assert redacted_text(text) == text


@pytest.mark.parametrize(
    "token",
    [
        "hf_" + "aB3dE6gH9" * 4,
        "ghp_" + "aB3dE6gH9" * 4,
        "github_pat_" + "aB3dE6gH9" * 4,
        "glpat-" + "aB3dE6gH9" * 3,
        "sk-proj-" + "aB3dE6gH9" * 4,
        "AKIAIOSFODNN7EXAMPLE",
        "ASIAIOSFODNN7EXAMPLE",
        "AIza" + "aB3dE6gH9" * 4,
        "xoxb-123456789012-abcdef",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def",
    ],
)
def test_a_token_is_known_by_its_form_wherever_it_stands(token):
    assert redacted_text(token) == REMOVED
    assert token not in json.dumps(redacted({"a": [f"x/{token}/y", {"b": f"say {token}."}]}))


def test_what_is_named_like_a_secret_goes_and_tokens_of_a_model_stay():
    assert redacted(["--wandb-api-key", SECRET, "--data", "d.json"]) == ["--wandb-api-key", REMOVED, "--data", "d.json"]
    kept = {"batch_tokens": 16384, "pad_token": "<pad>", "image_token": "<image>", "tokenizer": "t", "max_new_tokens": "3"}
    assert redacted({**kept, "password": SECRET, "hf_token": SECRET}) == {**kept, "password": REMOVED, "hf_token": REMOVED}


KEPT = [
    "s3://bucket/a@2x",
    "http://host:8080/a@b",
    "/data/train.json",
    "https://example.org/page#part",
    "--max-new-tokens=3",
    "pad_token=<pad>",
    "sha256=0123abcd",
    "design=3",
    "eos_token=</s>",
    "a.b@c.d",
    "focus_k=4",
]


@pytest.mark.parametrize("text", KEPT)
def test_what_holds_no_secret_is_kept(text):
    assert redacted_text(text) == text


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text("ab:/?@=# "), lambda of: st.lists(of, max_size=3)))
def test_a_record_is_redacted_once_for_all_and_stays_json(value):
    once = redacted(value)
    assert redacted(once) == once
    json.dumps(once)


def test_secrets_of_the_environment_are_known_by_value(monkeypatch):
    monkeypatch.setenv("SOME_TOOL_TOKEN", SECRET)
    monkeypatch.setenv("TLS_KEY", "/etc/certificates/key")
    assert redacted_text(f"said {SECRET}; reads /etc/certificates/key") == f"said {REMOVED}; reads /etc/certificates/key"


def files_with(folder, *secrets):
    """The files below a folder whose bytes hold a secret."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)]


@pytest.mark.slow
def test_no_file_that_a_run_writes_holds_a_credential(door, data, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    signature = "9f8e7d6c5b4a39281706"
    # A local folder whose URL ends like a presigned one: what the job opens is the URL as it was given.
    folder = tmp_path / f"cache?X-Amz-Signature={signature}"
    cache = f"file://{folder}"
    common = ["--images", IMAGES, "--device", "cpu", "--data", data]
    out = tmp_path / "out"
    logs = tmp_path / "logs"
    words = ["cache-teacher", "--teacher", TEACHER, "--cache", cache, *common, "--shard-samples", 2]
    first = door(*words, "--log-file", logs / "one.log", "--log-level", "debug")
    words = ["distill", "--student", STUDENT, "--cache", cache, *common, "--out", out, "--max-steps", 2, "--batch-size", 2]
    second = door(*words, "--save-steps", 1, "--workers", 0, "--log-file", logs / "two.jsonl", "--log-json")
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert files_with(folder, signature, SECRET) == []
    assert files_with(out, signature, SECRET) == []
    assert files_with(logs, signature, SECRET) == []
    assert "cache?REDACTED" in (logs / "one.log").read_text()
    for finished in (first, second):
        assert signature not in finished.stdout + finished.stderr
    refused = door(*words, "--save-steps", 1, "--workers", 0)
    assert refused.code == 2
    assert signature not in refused.stderr
    again = door(*words, "--save-steps", 1, "--workers", 0, "--resume")  # the record without the signature is the same run
    assert again.code == 0, again.stderr


def test_an_error_about_a_url_does_not_show_its_user(door):
    finished = door("cache", "status", f"memory://user:{SECRET}@box/cache")
    assert finished.code == 2
    assert SECRET not in finished.stderr
    finished = door("cache", "status", f"nosuch://user:{SECRET}@box/cache?sig={SECRET}")
    assert finished.code == 2
    assert SECRET not in finished.stderr
    assert "nosuch://" in finished.stderr
