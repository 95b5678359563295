"""The conformance suite is no test file of its own, but its assertions are shown like those of one."""

import pytest

pytest.register_assert_rewrite("benchmark_conformance")
