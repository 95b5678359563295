"""Only plain files are read: a named pipe would make a job wait for ever, a device would fill the memory."""

from __future__ import annotations

import errno
import os
import signal
import socket

import pytest
from tiny_models import GOLDEN

from alignkd.errors import AlignkdError, CheckpointError, ConfigError
from alignkd.losses.recipes import get_recipe
from alignkd.models.loading import load_vlm
from alignkd.pipeline.config.presets import read_settings
from alignkd.pipeline.training.deepspeed_configs import read_deepspeed_config
from alignkd.plain_files import open_plain, read_plain
from alignkd.plugins import load_plugins

READERS = {
    "recipe.yaml": lambda path: get_recipe(str(path)),
    "settings.yaml": lambda path: read_settings(str(path), "distill"),
    "zero.json": lambda path: read_deepspeed_config(str(path)),
    "plugin.py": lambda path: load_plugins([str(path)]),
}


@pytest.fixture(autouse=True)
def never_for_ever():
    """What waits for a writer is ended, and so fails."""

    def stop(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_the_bytes_of_a_plain_file_and_of_a_link_to_one_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 1000)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert read_plain(tmp_path / "b", 1000) == b"x" * 1000
    with open_plain(tmp_path / "b") as file:
        assert file.read(3) == b"xxx"


def test_a_file_that_is_too_large_is_refused_by_its_size_before_it_is_read(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="1,099,511,627,776 bytes, more than the 10 allowed") as raised:
        read_plain(tmp_path / "a", 10)
    assert raised.value.errno == errno.EFBIG


def test_a_file_that_claims_to_be_empty_is_read_up_to_the_limit():
    # Files of /proc have no size until they are read.
    assert b"processor" in read_plain("/proc/cpuinfo", 2**24)
    with pytest.raises(OSError, match="more than the 64 bytes allowed"):
        read_plain("/proc/cpuinfo", 64)


@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a socket", "a directory"])
def test_what_is_no_plain_file_is_refused_by_its_kind(tmp_path, kind):
    path = tmp_path / "x"
    with socket.socket(socket.AF_UNIX) as listening:
        if kind == "a named pipe":
            os.mkfifo(path)
        elif kind == "a device":
            path.symlink_to("/dev/zero")
        elif kind == "a socket":
            listening.bind(str(path))
        else:
            path.mkdir()
        with pytest.raises(OSError, match=f"{kind}, expected a plain file"):
            read_plain(path, 100)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["named pipe", "device"])
def test_files_of_options_are_plain_files(tmp_path, name, kind):
    if kind == "named pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=rf"{name}.*a {kind}, expected a plain file"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "extra.bin"])
def test_a_checkpoint_with_a_named_pipe_is_refused_before_anything_reads_it(tmp_path, name):
    for file in (GOLDEN / "student").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name} is a named pipe, a socket or a device"):
        load_vlm(tmp_path)


def test_settings_that_are_nested_too_deeply_are_one_message(tmp_path):
    (tmp_path / "settings.yaml").write_text("[" * 5000)
    with pytest.raises(AlignkdError, match=r"settings\.yaml is not YAML"):
        read_settings(str(tmp_path / "settings.yaml"), "distill")
