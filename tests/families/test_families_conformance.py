"""Every family keeps every promise of :mod:`family_conformance`."""

from __future__ import annotations

import pytest
from checkpoints import FAMILIES
from family_conformance import FamilyConformance


class TestFamilies(FamilyConformance):
    @pytest.fixture(scope="class", params=list(FAMILIES))
    def name(self, request):
        return request.param
