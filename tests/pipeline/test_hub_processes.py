"""Models by name through the real entry point: fetched by one of the processes of a run, then used by all, without the Hub."""

from __future__ import annotations

import json

import pytest
from hub_server import serving
from jobs import distill_arguments, run_job
from tiny_runs import IMAGES, STUDENT, copy_checkpoint
from warm_door import WarmDoor

pytestmark = [pytest.mark.slow, pytest.mark.processes]


def test_a_run_of_two_processes_fetches_its_student_once_and_what_it_made_is_pushed_and_used(
    tmp_path, monkeypatch, data, cache
):
    student = copy_checkpoint(STUDENT, tmp_path / "small")
    with serving() as hub:
        commit = hub.add("org/small", student)
        door = WarmDoor(tmp_path, **hub.environment(tmp_path / "home"))
        try:
            out = tmp_path / "run"
            arguments = distill_arguments(data, cache, out, "--max-steps", 2)
            arguments[arguments.index(STUDENT)] = "org/small"
            ended = run_job(door, monkeypatch, *arguments, "--download")
            assert [one.code for one in ended] == [0, 0], ended
            assert json.loads((out / "run.json").read_text())["configuration"]["student"] == f"org/small@{commit}"
            fetched = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
            assert len(set(fetched)) == len(fetched) > 3
            pushed = door("push", out, "org/trained", "--license", "apache-2.0")
            assert pushed.code == 0, pushed
            card = hub.repos["org/trained"].commits[hub.repos["org/trained"].refs["main"]]["README.md"].decode()
            assert "base_model: org/small\n" in card
            asked = ("evaluate", "--model", "org/trained", "--data", data, "--images", IMAGES, "--device", "cpu")
            refused = door(*asked)
            assert refused.code == 2, refused
            assert "hf download org/trained --revision main --local-dir trained" in refused.stderr
            found = door(*asked, "--download", "--json")
            assert found.code == 0, found
            hub.refuse = (500, "")
            assert door(*asked, "--json").stdout == found.stdout
            busy = door("show", "--model", "org/other", "--data", data, "--download")
            assert busy.code == 75, busy
        finally:
            door.close()
