from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import FAMILIES

_NO_CALL = SimpleNamespace(params={})
LARGE = ("aya_vision", "llava_next")
"""Families whose smallest checkpoints take several times as long as the others'."""


def pytest_collection_modifyitems(items):
    """The promises of large families are slow tests, and so are whole runs of all families but two."""
    for item in items:
        given = [value for value in getattr(item, "callspec", _NO_CALL).params.values() if isinstance(value, str)]
        family = next((name for name in given if name in FAMILIES), None)
        whole_run = item.path.name == "test_families_end_to_end.py" and family not in ("llava", "mobilevlm_v1")
        if item.path.parent.name == "families" and family is not None and (family in LARGE or whole_run):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The folder of a family's checkpoint of a seed, written once."""
    root, done = tmp_path_factory.mktemp("families"), {}

    def write(name: str, seed: int = 0) -> Path:
        if (name, seed) not in done:
            FAMILIES[name].write(folder := root / f"{name}-{seed}", seed)
            done[name, seed] = folder
        return done[name, seed]

    return write
