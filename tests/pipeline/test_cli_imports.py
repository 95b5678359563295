"""Commands that need no model load neither torch nor transformers: they answer at once.

Each runs in a process forked from one that has imported nothing of alignkd. What is compared is the list of loaded modules,
not the time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

FORKS = """
import json, os, sys

for words in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        reports = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            from alignkd.cli import main

            main([*words], prog_name="alignkd")
            code = 0
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        heavy = sorted({"torch", "transformers"} & set(sys.modules))
        os.write(reports, (json.dumps([words, code, heavy]) + "\\n").encode())
        os._exit(0)
    os.waitpid(child, 0)
"""


def loaded(*commands):
    """What each command loaded that is slow to import; asserts that all of them end well."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", FORKS, words], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [code for _, code, _ in found] == [0] * len(commands), done.stderr
    return {" ".join(words): heavy for words, _, heavy in found}


def test_help_of_every_command_and_the_list_of_models_load_no_torch():
    commands = [
        "",
        "cache-teacher",
        "distill",
        "show",
        "evaluate",
        "report",
        "demo",
        "cache",
        "cache status",
        "benchmark",
        "benchmark run",
        "benchmark score",
        "benchmark report",
    ]
    found = loaded(["models"], ["models", "--json"], ["--version"], *([*name.split(), "--help"] for name in commands))
    assert set(map(tuple, found.values())) == {()}, found


@pytest.mark.slow
@pytest.mark.parametrize("shard_format", ["zarr", "webdataset"])
def test_looking_after_a_cache_loads_no_torch(cache, tmp_path, shard_format):
    from alignkd.cache_store.protocol.maintenance.convert import convert

    other = {"zarr": "webdataset", "webdataset": "zarr"}[shard_format]
    copy = shutil.copytree(cache, tmp_path / "zarr")
    if shard_format == "webdataset":
        copy = convert(cache, tmp_path / "webdataset").url
    found = loaded(
        ["cache", "status", copy],
        ["cache", "verify", copy],
        ["cache", "repair", copy],
        ["cache", "inspect", copy],
        ["cache", "inspect", copy, "--id", "cap0", "--save", tmp_path / "row.npz"],
        ["cache", "convert", copy, tmp_path / "converted", "--format", other],
    )
    assert set(map(tuple, found.values())) == {()}, found
