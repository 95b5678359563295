"""Where the text of several models looks, on the same test images."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from alignkd.capture.attention import enable_capture
from alignkd.inputs.regions import region
from alignkd.models.encoders.images import to_display
from alignkd.models.families.mobilevlm import MobileVlmFamily
from alignkd.models.loading import load_vlm
from alignkd.pipeline.config.shared import DEFAULT_MAX_LENGTH
from alignkd.pipeline.data.easy_vqa import EasyVqa, Question
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.sample import Sample, parse_sample
from alignkd.pipeline.evaluate.show_sample import captured_arrays
from alignkd.pipeline.figures.attention import Figure, image_heat, overlay, plt, set_title


def attention_grid(models: Mapping[str, Path], data: EasyVqa, *, seed: int, device: str, count: int = 5) -> Figure:
    """Test images in rows, models in columns. ``models``: folders by the names that the page shows; ``seed``: of the choice."""
    chosen = _different_images(data.test, count, seed)
    figure, axes = plt.subplots(count, 1 + len(models), figsize=(2.0 * (1 + len(models)), 2.25 * count), squeeze=False)
    for column, (name, folder) in enumerate(models.items(), start=1):
        vlm = load_vlm(folder, device=device)
        assert isinstance(vlm, MobileVlmFamily)
        enable_capture(vlm)
        preparer = Preparer.of(vlm, template=vlm.default_template, max_length=DEFAULT_MAX_LENGTH, image_root=data.root)
        for row, question in enumerate(chosen):
            prepared = preparer(_as_sample(question))
            arrays = captured_arrays(vlm, prepared)
            picture = to_display(prepared.input.images[0], vlm.images)
            heat = image_heat(arrays["attention_HTV"], region(0, vlm.vision_grid)[None], 0)
            share = arrays["attention_HTV"].sum(axis=2).mean()
            overlay(axes[row, column], picture, heat, f"{name}\n{share:.0%} on the image")
            axes[row, 0].imshow(picture)
            axes[row, 0].axis("off")
            set_title(axes[row, 0], f"{question.text}\n{question.answer}", size=7)
    figure.tight_layout()
    return figure


def _different_images(questions: list[Question], count: int, seed: int) -> list[Question]:
    order = np.random.default_rng(seed).permutation(len(questions))
    chosen: dict[str, Question] = {}
    for index in order.tolist():
        question = questions[index]
        if question.text.startswith("what") and question.answer not in {q.answer for q in chosen.values()}:
            chosen.setdefault(question.image, question)
        if len(chosen) == count:
            break
    return list(chosen.values())


def _as_sample(question: Question) -> Sample:
    turns = [{"from": "human", "value": f"<image>\n{question.text}"}, {"from": "gpt", "value": question.answer}]
    return parse_sample({"id": question.id, "image": question.image, "conversations": turns}, question.id)
