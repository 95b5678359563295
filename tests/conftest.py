"""What every test shares: one thread a process, hypothesis without a deadline, and the markers of tests/README.md."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

# Several pytest processes share the cores. Processes that a test starts inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

# No hypothesis test fails because the machine is busy, because of the examples that chance gave it to choose from, or because
# several classes inherit it from a conformance suite.
_HARMLESS = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.differing_executors]
settings.register_profile("alignkd", deadline=None, suppress_health_check=_HARMLESS)
settings.load_profile("alignkd")

# Models here are tiny, and runs are compared bit by bit: the number of threads must not depend on the machine.
torch.set_num_threads(1)

pytest_plugins = ["s3_server"]


@pytest.fixture(scope="session", autouse=True)
def local_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies and what is unpacked of data lie in a folder of the tests, also for processes that they start."""
    folder = tmp_path_factory.mktemp("local-cache")
    os.environ["ALIGNKD_CACHE"] = str(folder)
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Set the markers that follow from where a test lies and what it uses, before ``-m`` selects."""
    families = os.path.join(os.path.dirname(__file__), "families")
    for item in items:
        if item.path.is_relative_to(families):
            item.add_marker("families")
        # Fixtures that a parameter chooses ("local", "memory", "s3") are not among those named by the test.
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "s3" in item.fixturenames or any(isinstance(value, str) and value == "s3" for value in parameters):
            item.add_marker("s3")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape halves of surrogate pairs in captured output: pytest-xdist cannot send them from one process to another."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
