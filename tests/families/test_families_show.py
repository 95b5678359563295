"""The table of a sample's tokens has one row for each image, whether its family writes one id for it or one a vision token."""

from __future__ import annotations

from itertools import pairwise

import pytest
from checkpoints import FAMILIES
from conversations import ONE
from family_conformance import prepared

from alignkd.models.loading import load_vlm
from alignkd.pipeline.data.preparer import Prepared
from alignkd.pipeline.evaluate.show_sample import row_pieces, token_table


@pytest.mark.parametrize("name", FAMILIES)
def test_vision_tokens_that_follow_each_other_are_one_row(written, name):
    vlm = load_vlm(written(name))
    sample = Prepared(prepared(vlm, ONE), "a digest", truncated=False)
    table = token_table(vlm, sample)
    layout = vlm.collator.expand(sample.input)
    vision = [entry for entry in table if entry["place"] == "vision"]
    assert sum(entry["tokens"] for entry in vision) == len(layout.vision_columns)
    assert sum(entry["tokens"] for entry in table) == len(layout.input_ids)
    assert [entry["position"] for entry in table] == [sum(e["tokens"] for e in table[:i]) for i in range(len(table))]
    if vlm.tokens_per_placeholder == 1:
        places = [entry["place"] for entry in table]
        assert not any(first == second == "vision" for first, second in pairwise(places))
    assert all(entry["piece"] == f"<image: {entry['tokens']} vision tokens>" for entry in vision)
    assert len(row_pieces(vlm, sample)) == len(layout.text_rows)
