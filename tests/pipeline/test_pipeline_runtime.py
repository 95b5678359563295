"""Devices and dtypes that are not there, files that a kill leaves whole, and rooms that load without torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignkd.errors import ConfigError
from alignkd.pipeline.runtime.devices import parse_dtype, pick_device
from alignkd.pipeline.runtime.files import replace_text, save_arrays


@pytest.mark.parametrize("module", ["progress", "ranks", "signals", "run_record", "files"])
def test_what_commands_need_at_once_loads_without_torch(module):
    code = f"import sys, alignkd.pipeline.runtime.{module}; print(*sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "", "cpu:x"])
def test_a_device_that_cannot_be_used_is_refused(name):
    with pytest.raises(ConfigError, match=f"--device {name} cannot be used here: ."):
        pick_device(name)


def test_a_device_that_is_there_is_taken():
    assert pick_device("cpu") == "cpu"
    assert pick_device(None).partition(":")[0] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_dtype_that_is_not_known_is_refused():
    assert parse_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(ConfigError, match="'float8' is not known; expected float32, bfloat16, float16"):
        parse_dtype("float8")


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    replace_text(path, "before")
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            replace_text(path, "after")
    assert path.read_text() == "before"
    replace_text(path, "after")
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == {"run.json": "after"}


NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True) | st.sampled_from(["file", "allow_pickle"])


@given(st.dictionaries(NAMES, st.lists(st.floats(width=32))))
def test_arrays_of_any_name_are_saved_as_numpy_reads_them(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("arrays") / "row.npz"
    arrays = {name: np.array(numbers, np.float32) for name, numbers in values.items()}
    save_arrays(path, arrays)
    with np.load(path) as found:
        assert set(found.files) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
