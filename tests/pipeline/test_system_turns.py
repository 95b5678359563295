"""A system turn of a data file takes part in the prompt of show and evaluate; only answers are supervised."""

from __future__ import annotations

import json

import pytest
from tiny_runs import GOLDEN_SAMPLES, IMAGES, STUDENT, write_data

from alignkd.pipeline.config.evaluate import EvaluateConfig
from alignkd.pipeline.config.show import ShowConfig
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.evaluate.runner import evaluate
from alignkd.pipeline.evaluate.show_sample import show

SAID = "Answer as a sailor would."
PLAIN = GOLDEN_SAMPLES[0]
WITH_SYSTEM = {**PLAIN, "id": "sailor", "conversations": [{"from": "system", "value": SAID}, *PLAIN["conversations"]]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("system") / "d.json", [PLAIN, WITH_SYSTEM])


def shown(data, name, **settings):
    return show(ShowConfig(model=str(STUDENT), data=str(data), images=str(IMAGES), id=name, device="cpu", **settings))


def words(tokens):
    return "".join(token["piece"] for token in tokens).replace("\u2581", " ")


def test_the_keys_of_samples_without_a_system_turn_are_as_they_were(data):
    assert SampleFile(data).key(0) == SampleFile(write_data(data.parent / "one.json", [PLAIN])).key(0)
    assert SampleFile(data).key(0) != SampleFile(data).key(1)


def test_show_has_the_system_text_before_the_image_and_supervises_the_same_answer(data):
    found, plain = shown(data, "sailor"), shown(data, PLAIN["id"])
    before = [token for token in found.tokens if token["place"] == "before image"]
    assert words(before).strip().removeprefix("<s>").strip() == f"{SAID} USER:"
    supervised = [[t["id"] for t in one.tokens if t["supervised"]] for one in (found, plain)]
    assert supervised[0] == supervised[1]
    assert not any(token["supervised"] for token in before)
    assert found.arrays["attention_HTV"].shape == plain.arrays["attention_HTV"].shape


def test_evaluate_asks_with_it_and_compares_with_the_last_answer(data, tmp_path):
    result = evaluate(
        EvaluateConfig(model=str(STUDENT), data=str(data), images=str(IMAGES), out=str(tmp_path / "out"), device="cpu")
    )
    assert (result["answered"], result["rejected"]) == (2, 0)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["question"] for line in lines] == [PLAIN["conversations"][0]["value"]] * 2


def test_a_template_without_a_place_rejects_the_sample_by_name(data):
    with pytest.raises(ValueError, match="sample 'sailor': the template plain has no place for a system turn"):
        shown(data, "sailor", template="plain")
