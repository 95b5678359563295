"""The job files of docs/cluster.md are sound: they parse, and every command line in them is one that alignkd takes."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import yaml

from alignkd.cli import main

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


@pytest.mark.parametrize("words", commands(TEXT), ids=lambda words: " ".join(words[:3]))
def test_every_command_of_the_cluster_guide_is_one_that_alignkd_takes(words):
    assert parse(words).params


def test_the_guide_holds_commands():
    assert len(commands(TEXT)) >= 6
