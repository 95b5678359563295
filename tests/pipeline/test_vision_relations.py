"""The term of vision relations in a run."""

from __future__ import annotations

import pytest
from tiny_runs import metrics, train


def test_it_trains_by_its_name_and_is_logged(tmp_path, data, cache):
    train(data, cache, tmp_path / "out", recipe="sft", overrides={"vision_relations": "2"}, max_steps=3)
    for line in metrics(tmp_path / "out"):
        assert 0 < line["vision_relations"] < 2
        assert line["loss"] == pytest.approx(line["supervised"] + 2 * line["vision_relations"], rel=1e-5)
