"""A cache says which release's ids, labels and pixel values its rows belong to, and is refused where those have changed."""

from __future__ import annotations

import pytest

from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.errors import CacheError
from alignkd.models.encoders import version
from alignkd.models.encoders.version import ENCODER_VERSION, encoder_version
from alignkd.pipeline.cache_io.compatibility import check_student_compatible
from alignkd.pipeline.cache_io.teacher_fingerprint import model_fingerprint


@pytest.fixture
def fingerprint(cache):
    """Of a cache of the golden MobileVLM."""
    return dict(CacheReader(cache).fingerprint)


def checked(student, fingerprint, template="v1", **needs):
    return check_student_compatible(student, fingerprint, template, fingerprint["max_length"], "the-cache", **needs)


def test_a_cache_whose_samples_are_as_they_were_has_the_fingerprint_that_it_always_had(fingerprint, student_vlm):
    assert "encoder" not in fingerprint
    assert encoder_version("mobilevlm", "v1") == encoder_version("mobilevlm", "plain") == 1
    checked(student_vlm, fingerprint)


def test_a_cache_from_before_a_change_of_its_samples_is_refused_with_the_reason(fingerprint, student_vlm, monkeypatch):
    later = ENCODER_VERSION + 1
    change = version.EncoderChange(later, "pictures are turned upside down", lambda family, template: family == "mobilevlm")
    monkeypatch.setattr(version, "CHANGES", (*version.CHANGES, change))
    assert model_fingerprint(student_vlm, "v1")["encoder"] == later
    with pytest.raises(CacheError, match=r"since then pictures are turned upside down.*alignkd cache-teacher"):
        checked(student_vlm, fingerprint)
    # A recipe that reads no row has no reason to care.
    checked(student_vlm, fingerprint, needs=frozenset())


def test_a_chat_teachers_cache_from_before_is_refused_whatever_its_student_is(fingerprint, student_vlm):
    old = {**fingerprint, "template": "chat", "teacher": {**fingerprint["teacher"], "family": "qwen3_vl"}}
    with pytest.raises(CacheError, match=r"earlier version.*as it stands in the file"):
        checked(student_vlm, old, fields=["spans", "regions"])


def test_a_cache_of_a_later_version_is_refused(fingerprint, student_vlm):
    with pytest.raises(CacheError, match="later version of alignkd"):
        checked(student_vlm, {**fingerprint, "encoder": 99})
