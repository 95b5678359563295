"""A wheel is built and installed, without extras, in an empty environment; both stages run there with both formats."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import IMAGES, SAMPLES, STUDENT, TEACHER, write_data

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SOURCES = ("alignkd", "pipeline", "cache_store", "cli.py", "pyproject.toml", "README.md", "LICENSE")
MACHINE = ["--images", IMAGES, "--device", "cpu"]


def run(*words, cwd):
    """Run a program that sees neither this checkout nor this environment."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PYTHONNOUSERSITE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture
def folder(tmp_path):
    """Removed at the end: an environment with torch takes gigabytes, and pytest keeps the folders of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture
def wheel(folder):
    """Built from a copy: setuptools leaves folders behind, and would take up what is left of an earlier build."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder / "dist", source, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@pytest.fixture
def scripts(folder, wheel):
    """The folder of the environment's programs."""
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    scripts = folder / "venv" / "bin"
    constraints = ["--constraint", ROOT / "constraints.txt"]
    # Compiling every module of torch takes minutes; those that are imported are compiled then.
    run(scripts / "python", "-m", "pip", "install", "--quiet", "--no-compile", *constraints, wheel, cwd=folder)
    return scripts


def figures(scripts, folder, *arguments):
    return json.loads(run(scripts / "alignkd", *arguments, "--json", cwd=folder))


def test_a_wheel_without_extras_runs_both_stages_and_installs_nothing_but_the_package(scripts, folder):
    """One test, as its environment takes minutes to install."""
    assert "cache-teacher" in run(scripts / "alignkd", "--help", cwd=folder)
    assert "llava" in run(scripts / "alignkd", "models", cwd=folder)
    assert_only_the_package_was_installed(scripts, folder)
    data = write_data(folder / "samples.json", SAMPLES)
    for shard_format in ("zarr", "webdataset"):
        cache, out = folder / f"cache-{shard_format}", folder / f"out-{shard_format}"
        arguments = ["cache-teacher", "--teacher", TEACHER, "--data", data, *MACHINE, "--cache", cache]
        assert figures(scripts, folder, *arguments, "--shard-samples", 2, "--format", shard_format)["complete"]
        arguments = ["distill", "--student", STUDENT, "--cache", cache, "--data", data, *MACHINE, "--out", out]
        assert figures(scripts, folder, *arguments, "--batch-size", 2, "--max-steps", 2, "--workers", 0)["steps"] == 2
    arguments = ["evaluate", "--model", out / "student", "--data", data, *MACHINE, "--max-new-tokens", 2]
    assert figures(scripts, folder, *arguments)["answered"] == len(SAMPLES)


def assert_only_the_package_was_installed(scripts, folder):
    code = "import alignkd, pathlib; print(pathlib.Path(alignkd.__file__).parents[1])"
    site = Path(run(scripts / "python", "-c", code, cwd=folder).strip())
    assert site.is_relative_to(folder / "venv")
    (info,) = site.glob("alignkd-*.dist-info")
    with open(info / "RECORD", newline="") as file:
        installed = {name for name, *_ in csv.reader(file)}
    assert {Path(name).parts[0] for name in installed} == {"alignkd", info.name, ".."}
    assert [name for name in installed if name.startswith("..")] == ["../../../bin/alignkd"]
    assert not {"pipeline", "cache_store", "cli.py", "tests", "benchmarks"} & {path.name for path in site.iterdir()}
