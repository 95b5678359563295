"""``alignkd check --model`` says of each sample what the family's own preparer says, without reading an image twice."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from alignkd.errors import SampleError
from alignkd.models.loading import load_vlm
from alignkd.pipeline.check.image_facts import Facts, look_at, place_hash
from alignkd.pipeline.check.with_model import ModelJudge, open_model
from alignkd.pipeline.config.check import CheckConfig
from alignkd.pipeline.data.open_samples import open_samples
from alignkd.pipeline.data.preparer import Preparer

LENGTHS = {"mobilevlm_v1": 250}
"""Ids of a maximum length that cuts some samples: its template's own text takes many."""
ASKED = ("<image>\nWhat is it?", "a dog")
FAMILIES = ["llava", "qwen2_5_vl", "smolvlm", "gemma3", "instructblip", "minigpt4", "paligemma", "mobilevlm_v1"]


def record(name, image, *texts, system=None):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    before = [] if system is None else [{"from": "system", "value": system}]
    return {"id": name, **({} if image is None else {"image": image}), "conversations": [*before, *turns]}


RECORDS = [
    record("good", "a.png", *ASKED),
    record("wide", "wide.png", *ASKED),
    record("turned", "turned.jpg", *ASKED),
    record("two", ["a.png", "wide.png"], "<image><image> Which?", "the cat"),
    record("text", None, "what is it?", "a dog"),
    record("missing", "gone.png", *ASKED),
    record("damaged", "damaged.png", *ASKED),
    record("thin", "thin.png", *ASKED),
    record("cut", "a.png", ASKED[0], "red " * 100),
    record("too long", "a.png", "<image>\n" + "what " * 100, "red"),
    record("image too late", "a.png", "what " * 100 + "<image>", "red"),
    record("order", None, "a", "b", "c"),
    record("empty", "a.png", ASKED[0], ""),
    record("system", "a.png", *ASKED, system="Be brief."),
    record("special", None, "a </s> b <|im_end|> ###", "c"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    rng = np.random.default_rng(0)
    for name, size in {"a.png": (40, 30), "wide.png": (90, 40), "turned.jpg": (64, 20), "thin.png": (2000, 1)}.items():
        image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(folder / name, **({"exif": exif} if name.startswith("turned") else {}))
    (folder / "damaged.png").write_bytes((folder / "a.png").read_bytes()[:400])
    (folder / "d.json").write_text(json.dumps(RECORDS))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_verdict_length_and_truncation_are_those_of_the_preparer(written, data, family):
    longest = LENGTHS.get(family, 60)
    config = CheckConfig(data=str(data / "d.json"), images=str(data), model=str(written(family)), max_length=longest)
    samples, model = open_samples(config), open_model(config)
    places = list(dict.fromkeys(place for i in range(len(samples)) for place in samples[i].places))
    facts = Facts.of([place_hash(place) for place in places], [look_at(place, model.encoder.decode) for place in places])
    judge = ModelJudge(model.encoder, model.tokens_per_placeholder, facts)
    vlm = load_vlm(written(family))
    own = Preparer.of(vlm, template=vlm.default_template, max_length=longest)
    assert model.template == vlm.default_template
    usable = 0
    for i in range(len(samples)):
        sample, verdict = samples[i], judge(samples[i])
        reason, prepared = "", None
        try:
            prepared = own.with_images(sample, own.text(sample))
        except SampleError as error:
            reason = str(error)
        assert verdict.reason == reason, sample.id
        if prepared is not None:
            positions = vlm.collate([prepared.input]).input_ids_BS.shape[1]
            assert (verdict.length, verdict.cut) == (positions, prepared.truncated), sample.id
            usable += 1
    assert 2 <= usable < len(RECORDS) - 3
