"""A short storm of faults: what ``benchmarks/damage/storm.py`` does two hundred times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

STORM = Path(__file__).parents[2] / "benchmarks" / "damage" / "storm.py"


@pytest.mark.slow
@pytest.mark.processes
def test_a_few_faults_lose_nothing_hang_nothing_and_end_with_the_right_exit_codes(tmp_path):
    words = ["--faults", "6", "--samples", "8", "--seed", "2", "--out", tmp_path / "storm.json"]
    done = subprocess.run([sys.executable, STORM, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "storm.json").read_text())
    assert all(done["faults"] for done in result["rounds"])
    assert (result["hangs"], result["problems"]) == (0, [])
