from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import FAMILIES


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
