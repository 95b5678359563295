"""``--template v1``: LLaVA's own prompt for any family with an image token, for students that know no chat template."""

from __future__ import annotations

import pytest
from PIL import Image

from alignkd.inputs.prompts import IGNORE, SYSTEM
from alignkd.models.loading import load_vlm

TURNS = [
    ("human", "<image>\nWhat is it?"),
    ("gpt", "A dog, caf\u00e9."),
    ("human", "And this <image> here?"),
    ("gpt", "A mat."),
]
IMAGES = [Image.new("RGB", (40, 30), (200, 10, 10)), Image.new("RGB", (30, 40), (10, 10, 200))]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm", "gemma3"])
def test_v1_gives_llavas_text_and_supervises_answers_and_their_end(written, name):
    vlm = load_vlm(written(name))
    encoder = vlm.encoder("v1", 2048)
    rendered = encoder.render(TURNS, 2)
    tag, end = vlm.processor.image_token, vlm.tokenizer.eos_token
    assert rendered.text == (
        f"{SYSTEM} USER: {tag}\nWhat is it? ASSISTANT: A dog, caf\u00e9.{end}USER: And this{tag}\nhere? ASSISTANT: A mat.{end}"
    )
    made, truncated = encoder.finish(TURNS, encoder.plan(TURNS, 2, [image.size for image in IMAGES]), IMAGES)
    assert not truncated
    supervised = vlm.tokenizer.decode(made.input_ids[made.labels != IGNORE])
    assert supervised.replace(" ", "") == f"Adog,caf\u00e9.{end}Amat.{end}"
    assert (made.labels[made.labels != IGNORE] == made.input_ids[made.labels != IGNORE]).all()
    question = encoder.question(TURNS, IMAGES)
    shared = len(question.input_ids) - 3
    assert (question.input_ids[:shared] == made.input_ids[:shared]).all()
    assert vlm.tokenizer.decode(question.input_ids).endswith("ASSISTANT:")


def test_a_template_that_no_family_knows_is_refused_with_those_that_are(written):
    with pytest.raises(ValueError, match="known are chat, v1"):
        load_vlm(written("llava")).encoder("plain", 2048)
