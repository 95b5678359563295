"""``alignkd models``: every family, what each supports, and why not."""

from __future__ import annotations

import json

from alignkd.models.registry import REFUSED, family_records

TITLES = [record.title or record.family for record in family_records()]


def test_every_family_is_listed_with_what_it_supports_and_why_not(door):
    finished = door("models", "--json")
    assert finished.code == 0
    found = {record["family"]: record for record in json.loads(finished.stdout)["families"]}
    assert set(found) == {*TITLES, *REFUSED}
    for kind, record in found.items():
        if kind in REFUSED:
            assert record["refused"]
            continue
        assert set(record) == {"family", "attention", "slice", "logits", "several images", "other students"}
        assert all(words == "yes" or words.startswith("no: ") for name, words in record.items() if name != "family")
    assert found["mobilevlm (V1, V2)"]["slice"] == "yes"
    assert found["instructblip"]["other students"].startswith("no: each vision token")


def test_the_table_names_each_family_and_each_reason(door):
    words = door("models").stdout
    for name in TITLES:
        assert f"\n{name} " in words
    assert "refused: mllama: its layers read the image by cross-attention" in words
    assert "slice, no: slices are made of MobileVLM's parts" in words
    assert "Any other image-text-to-text model of transformers is tried" in words
