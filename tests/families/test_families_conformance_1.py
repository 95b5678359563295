"""A fourth of the families keep every promise of :mod:`family_conformance`; the files are four so that each is short."""

from __future__ import annotations

import pytest
from checkpoints import FAMILIES
from family_conformance import FamilyConformance


class TestFamilies(FamilyConformance):
    @pytest.fixture(scope="class", params=list(FAMILIES)[1::4])
    def name(self, request):
        return request.param
