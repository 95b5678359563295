"""The job files of docs/cluster.md are sound: they parse, and every command line in them is one that alignkd takes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import yaml

from alignkd.cli import TryAgainError, UserError, main

TEXT = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
BASH = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
YAML = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    joined = re.sub(r"\\\n\s*", " ", text)
    return [
        shlex.split(line[line.index("alignkd ") :]) for line in joined.splitlines() if re.search(r"(^ {4}|\s)alignkd c", line)
    ]


def parse(words: list[str]) -> click.Context:
    """What click makes of a command line, without running it."""
    context, command = click.Context(main), main
    arguments = words[1:]
    while isinstance(command, click.Group):
        _, command, arguments = command.resolve_command(context, arguments)
    return command.make_context("x", arguments, parent=context)


def test_the_slurm_script_is_sound_bash():
    assert len(BASH) == 1
    for script in BASH:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_kubernetes_job_is_indexed_and_says_of_how_many():
    job = yaml.safe_load(YAML[0])
    spec, container = job["spec"], job["spec"]["template"]["spec"]["containers"][0]
    assert spec["completionMode"] == "Indexed"
    assert container["env"] == [{"name": "WORLD_SIZE", "value": str(spec["completions"])}]
    assert parse(container["args"]).params["cache"].startswith("s3://")


def test_the_kubernetes_job_goes_on_after_75_and_fails_at_once_after_2():
    rules = yaml.safe_load(YAML[0])["spec"]["podFailurePolicy"]["rules"]
    actions = {code: rule["action"] for rule in rules if "onExitCodes" in rule for code in rule["onExitCodes"]["values"]}
    assert actions == {TryAgainError.exit_code: "Ignore", UserError.exit_code: "FailJob"}
    assert all(rule["onExitCodes"]["operator"] == "In" for rule in rules if "onExitCodes" in rule)
    # Only pods that are never restarted in place are looked at by a failure policy.
    assert yaml.safe_load(YAML[0])["spec"]["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("code", [0, 1, UserError.exit_code, TryAgainError.exit_code, 137])
def test_the_slurm_script_requeues_after_75_alone_and_ends_as_its_worker_did(tmp_path, code):
    for name, body in (("srun", f"exit {code}"), ("scontrol", f'echo "$@" >> {tmp_path}/asked')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3",
        "WORK": "/w",
    }
    assert subprocess.run(["bash", "-c", BASH[0]], env=environment, check=False).returncode == code
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7_3\n" if code == TryAgainError.exit_code else "")
    assert "#SBATCH --requeue\n" in BASH[0]


def test_the_table_of_exit_codes_has_those_of_the_command_line():
    assert {int(found) for found in re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)} == {
        0,
        UserError.exit_code,
        TryAgainError.exit_code,
    }


@pytest.mark.parametrize("words", commands(TEXT), ids=lambda words: " ".join(words[:3]))
def test_every_command_of_the_cluster_guide_is_one_that_alignkd_takes(words):
    assert parse(words).params


def test_the_guide_holds_commands():
    assert len(commands(TEXT)) >= 6
