"""The runner of benchmarks puts questions to every family, and its batches change no answer."""

from __future__ import annotations

import json

import pytest
from checkpoints import FAMILIES
from PIL import Image

from alignkd.models.families.mobilevlm import MobileVlmFamily
from alignkd.models.loading import load_vlm
from alignkd.pipeline.evaluate.benchmarks.llava import LlavaQuestions
from alignkd.pipeline.evaluate.running import answering
from alignkd.pipeline.evaluate.running.answering import Answering, RunSettings, run_benchmark
from alignkd.pipeline.evaluate.running.pictures import OWN_TREATMENT


@pytest.fixture
def questions(tmp_path):
    """Five questions about three pictures of different shapes."""
    for number, size in enumerate([(40, 30), (30, 50), (40, 40)]):
        Image.linear_gradient("L").resize(size).convert("RGB").rotate(90 * number).save(tmp_path / f"{number}.png")
    texts = ["What?", "What is it?", "Why is it so?", "What? Why?", "Is it?"]
    turns = [[{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "It."}] for text in texts]
    records = [{"id": f"q{i}", "image": f"{i % 3}.png", "conversations": asked} for i, asked in enumerate(turns)]
    (tmp_path / "questions.json").write_text(json.dumps(records))
    return LlavaQuestions.of(tmp_path / "questions.json", tmp_path, max_new_tokens=4)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_a_batch_are_those_of_one_question_at_a_time(written, questions, name):
    vlm = load_vlm(written(name))
    alone = run_benchmark(vlm, questions, RunSettings(batch_tokens=1))
    together = run_benchmark(vlm, questions)
    assert [r.prediction for r in together.readings] == [r.prediction for r in alone.readings]
    treatment = Answering(vlm, questions, RunSettings()).image_treatment
    assert treatment == ("pad" if isinstance(vlm, MobileVlmFamily) else OWN_TREATMENT)


def test_inputs_of_few_pictures_are_in_memory_at_once_where_questions_have_pixels_of_their_own(written, questions, monkeypatch):
    vlm, asked, real = load_vlm(written("llava")), [], answering.Pictures.ready
    monkeypatch.setattr(answering.Pictures, "ready", lambda self, some: asked.append(len(some)) or real(self, some))
    monkeypatch.setattr(answering, "WINDOW_OF_PIXELS", (2, 2))
    run_benchmark(vlm, questions)
    assert asked == [1, 1, 1]
