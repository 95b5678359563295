"""Every family makes as many vision tokens of a destroyed image; its advantages are those of two passes of each sample."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES
from PIL import Image

from alignkd.capture.advantage import advantages
from alignkd.capture.attention import capture
from alignkd.inputs.destroyed import destroy
from alignkd.models.loading import load_vlm
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.sample import parse_sample


def sample(number, image, answer):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
    return parse_sample({"id": str(number), "image": image, "conversations": turns}, "")


FAST = ("mobilevlm_v1", "qwen2_5_vl")
"""A family of one grid of vision tokens, and one whose number of them depends on the size of an image."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in FAMILIES])
def test_destroyed_images_have_the_same_ids_and_advantages_are_those_of_each_sample_alone(written, tmp_path, name):
    for number, size in enumerate([(90, 40), (33, 64)]):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    vlm = load_vlm(written(name))
    preparer = Preparer.of(vlm, template=vlm.default_template, max_length=4096, image_root=tmp_path, with_destroyed=True)
    samples = [sample(0, "0.png", "a ball"), sample(1, "1.png", "two red cubes")]
    inputs = [preparer(one).input for one in samples]
    for one, made in zip(samples, inputs, strict=True):
        assert made.destroyed is not None
        assert np.array_equal(made.destroyed.input_ids, made.input_ids)
        assert made.destroyed.images.shape == made.images.shape
        assert not made.destroyed.images.equal(made.images)
        image = destroy(preparer.decoded_images(one)[0])
        assert image.size == preparer.decoded_images(one)[0].size
        again = preparer.with_images(one, preparer.text(one)).input
        assert again.destroyed.images.equal(made.destroyed.images)
    with torch.inference_mode():
        batch = vlm.collate(inputs)
        found = advantages(vlm, batch, capture(vlm, batch, attention=False).hidden_AD)
        expected = []
        for made in inputs:
            logprobs = []
            for one in (replace(made, destroyed=None), made.destroyed):
                alone = vlm.collate([one])
                logits = vlm.head(capture(vlm, alone, attention=False).hidden_AD).double()
                logprobs.append(logits.log_softmax(1).gather(1, alone.answer_ids_A[:, None])[:, 0])
            expected.append((logprobs[0] - logprobs[1]).clamp(min=0))
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=1e-3, atol=2e-4)
