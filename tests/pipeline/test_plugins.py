"""Plugins: files that register terms, metrics and families from outside the package."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys

import pytest

from alignkd import plugins
from alignkd.errors import ConfigError
from alignkd.plugins import load_plugins, loaded_plugins


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(plugins, "_LOADED", {})


def write(path, text):
    path.write_text(text)
    return str(path)


def test_a_plugin_is_loaded_once_and_known_by_its_digest(tmp_path):
    path = write(tmp_path / "mine.py", "import builtins\nbuiltins.loads = getattr(builtins, 'loads', 0) + 1\n")
    (first,) = load_plugins([path])
    (second,) = load_plugins([path, str(tmp_path / "." / "mine.py")])
    assert first == second == loaded_plugins()[0]
    assert first.sha256 == hashlib.sha256((tmp_path / "mine.py").read_bytes()).hexdigest()
    import builtins

    assert builtins.__dict__.pop("loads") == 1


def test_classes_of_a_plugin_can_be_pickled(tmp_path):
    path = write(tmp_path / "mine.py", "class Mine:\n    pass\n")
    load_plugins([path])
    (module,) = [m for name, m in sys.modules.items() if name.startswith("alignkd_plugin_") and hasattr(m, "Mine")]
    assert type(pickle.loads(pickle.dumps(module.Mine()))) is module.Mine


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"none\.py: No such file"),
        ("def broken(:\n", r"SyntaxError: .*"),
        ("a = 1\n\nb = undefined\n", r"line 3: NameError: name 'undefined' is not defined"),
        ("import json\njson.loads('{')\n", r"line 2: JSONDecodeError"),
        ("import alignkd\nalignkd.register_metric('exact')(print)\n", r"line 2: ConfigError: a metric 'exact' is registered"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_one_message_that_names_the_line(tmp_path, text, said):
    path = tmp_path / "none.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=rf"--plugin .*{said}"):
        load_plugins([str(path)])


def test_a_plugin_that_has_changed_since_it_was_loaded_is_refused(tmp_path):
    path = write(tmp_path / "mine.py", "a = 1\n")
    load_plugins([path])
    write(tmp_path / "mine.py", "a = 2\n")
    with pytest.raises(ConfigError, match="has changed since it was loaded"):
        load_plugins([path])


def test_a_plugin_that_ends_the_program_is_a_users_error(tmp_path):
    path = write(tmp_path / "mine.py", "import sys\nsys.exit(0)\n")
    with pytest.raises(ConfigError, match=r"mine.py: line 2: SystemExit: 0"):
        load_plugins([path])


@pytest.mark.slow
def test_importing_alignkd_loads_nothing_heavy_and_its_public_names_are_there():
    code = (
        "import sys, alignkd; heavy = {'torch', 'transformers', 'numpy', 'click'} & set(sys.modules); assert not heavy, heavy;"
        "assert {'load_vlm', 'distill', 'Objective', 'CacheReader', 'register_term'} <= set(dir(alignkd));"
        "alignkd.DistillConfig, alignkd.get_recipe('align-kd'), alignkd.CacheTeacherConfig, alignkd.EvaluateConfig;"
        "assert 'torch' not in sys.modules;"
        "missing = [name for name in alignkd.__all__ if not hasattr(alignkd, name)]; assert not missing, missing"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_alignkd_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "alignkd", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("alignkd, version ")
