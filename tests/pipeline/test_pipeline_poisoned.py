"""A cache with values that no teacher gives, under valid checksums: stage two refuses it and names the place."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner
from forged_rows import forge, reshape, set_all
from tiny_runs import GOLDEN, IMAGES, STUDENT, numbered, write_cache, write_data

from alignkd.cli import main

ANSWERS = ("topk_rank_steps", "topk_logprob_codes", "tail_logmass", "sketch")
FORGERIES = {
    "tail that is not a number": ("tail_logmass", set_all("tail_logmass", "values", np.nan)),
    "attention of 60000": ("attention", set_all("attention", "scales", 60000)),
    "attention rows of more than 1": ("attention", set_all("attention", "codes", 255)),
    "rank beyond the vocabulary": ("topk_rank_steps", set_all("topk_rank_steps", "values", 65535)),
    "negative scales of vision tokens": ("vision_tokens", set_all("vision_tokens", "scales", -1)),
    "5 answers too many": ("topk_rank_steps", reshape(0, 5, *ANSWERS)),
    "vision tokens too narrow": ("vision_tokens", reshape(1, -32, "vision_tokens")),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("four") / "data.json", numbered(4))


@pytest.mark.parametrize(
    ("shard_format", "name"),
    [
        ("zarr", "tail that is not a number"),
        ("webdataset", "attention of 60000"),
        *(pytest.param("zarr", name, marks=pytest.mark.slow) for name in list(FORGERIES)[1:]),
        pytest.param("webdataset", "5 answers too many", marks=pytest.mark.slow),
    ],
)
def test_what_no_teacher_gives_ends_stage_two_with_exit_code_2_and_names_shard_row_and_field(
    data, tmp_path, shard_format, name
):
    field, change = FORGERIES[name]
    write_cache(data, tmp_path / "cache", shard_format=shard_format, shard_samples=4)
    forge(tmp_path / "cache", change, number=0)
    options = {
        "--student": STUDENT,
        "--vision-tower": GOLDEN / "clip",
        "--data": data,
        "--images": IMAGES,
        "--cache": tmp_path / "cache",
        "--out": tmp_path / "run",
        "--batch-size": 2,
        "--max-steps": 2,
        "--report-to": "none",
        "--device": "cpu",
    }
    result = CliRunner().invoke(main, ["distill", *(str(word) for pair in options.items() for word in pair)])
    assert result.exit_code == 2, result.output
    words = result.stderr.partition("Error: ")[2]
    assert "shard 0 of the cache at" in words
    assert "row " in words
    assert f"field '{field}'" in words
