"""docs/add-a-benchmark.md is short, and its example is a benchmark."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from benchmark_conformance import score_of, write_lines

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks import registry

PAGE = (Path(__file__).parents[3] / "docs" / "add-a-benchmark.md").read_text()
IMPORTS = """
from collections.abc import Sequence
from pathlib import Path
from typing import Self
from alignkd.pipeline.evaluate.benchmarks.contract import About, Answer, Benchmark, Question, Reading, Score
from alignkd.pipeline.evaluate.benchmarks.files import read_json, require_files
from alignkd.pipeline.evaluate.benchmarks.shared.fields import Entry, entry_of
from alignkd.pipeline.evaluate.benchmarks.shared.matching import by_id
from alignkd.pipeline.evaluate.benchmarks.shared.question_file import SHORT_ANSWER
"""


def test_the_page_is_under_60_lines():
    assert len(PAGE.splitlines()) < 60


def test_the_example_is_a_benchmark(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    exec(IMPORTS + code, names)
    monkeypatch.setattr(registry, "benchmark_class", lambda name: names[name.capitalize()])
    with pytest.raises(DataError, match=r"lacks colours.json of Colours; .*https://example.org/colours"):
        registry.open_benchmark("colours", tmp_path)
    rows = [{"id": name, "question": "Which?", "image": f"{name}.jpg", "answer": "red"} for name in "ab"]
    (tmp_path / "colours.json").write_text(json.dumps({"data": rows}))
    answers = write_lines(tmp_path / "a.jsonl", [{"question_id": "a", "text": " RED"}, {"question_id": "b", "text": "blue"}])
    assert score_of("colours", tmp_path, answers).metrics == {"accuracy": 50.0}
    del rows[0]["answer"]
    (tmp_path / "colours.json").write_text(json.dumps({"data": rows}))
    with pytest.raises(DataError, match="number 1: 'answer' is missing"):
        registry.open_benchmark("colours", tmp_path)
