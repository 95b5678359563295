"""A family's model is described from its small files as it is when its weights are loaded."""

from __future__ import annotations

import pytest
from checkpoints import FAMILIES

from alignkd.models.loading import describe_vlm, load_vlm
from alignkd.pipeline.cache_io.teacher_fingerprint import model_fingerprint

WITHOUT = {"minigpt4"}
"""Families that need their weights to be described."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_described_without_its_weights(name, written):
    described, whole = describe_vlm(written(name)), load_vlm(written(name))
    if name in WITHOUT:
        assert described is None
        return
    assert all(parameter.is_meta for parameter in described.model.parameters())
    for template in whole.templates:
        assert model_fingerprint(described, template) == model_fingerprint(whole, template)
    parts = ("layers", "heads", "hidden_size", "vocabulary", "templates", "default_template", "family", "without_coordinates")
    assert [getattr(described, part) for part in parts] == [getattr(whole, part) for part in parts]
    assert described.tokenizer_fingerprint(50) == whole.tokenizer_fingerprint(50)
