from __future__ import annotations

import pytest
from tiny_models import GOLDEN, write_checkpoint

from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm


@pytest.fixture(scope="session")
def golden_models() -> dict[str, Vlm]:
    return {name: load_vlm(GOLDEN / name) for name in ("teacher", "student")}


@pytest.fixture(scope="session")
def tokenizer(golden_models):
    return golden_models["student"].tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_checkpoint(folder, num_key_value_heads=2)
    return folder


@pytest.fixture
def tiny(tiny_folder) -> Vlm:
    """A fresh tiny model with grouped key/value heads: 2 x 2 vision tokens an image."""
    return load_vlm(tiny_folder)


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Vlm:
    """Three layers, eight heads, wider than the tiny student of two layers."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    write_checkpoint(folder, seed=1, hidden_size=32, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=3)
    return load_vlm(folder)
