"""Pixel values of every kind of image file are those of the family's own processor, given what its own loader opens."""

from __future__ import annotations

import io

import pytest
import torch
from checkpoints import FAMILIES
from image_kinds import KINDS, SIZE
from PIL import Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from alignkd.models.encoders.image_files import image_size
from alignkd.models.encoders.processors import load_processor
from alignkd.models.loading import load_vlm
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.sample import parse_sample

BY_PILLOW = {"minigpt4", "mobilevlm_v1"}
"""Families whose reference loader is ``Image.open(path).convert("RGB")``; it knows no orientation."""


@pytest.fixture(scope="session")
def folder_of_kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    for name, make in KINDS.items():
        (folder / name).write_bytes(make())
    return folder


def reference_values(folder, name, path):
    """Pixel values by transformers and Pillow alone."""
    if name == "minigpt4":
        processor = CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False)
        return processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
    if name == "mobilevlm_v1":
        settings = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "resample": 3}
        processor = CLIPImageProcessorPil(**settings)
        image = Image.open(path).convert("RGB")
        square = Image.new("RGB", (max(image.size),) * 2, tuple(int(x * 255) for x in processor.image_mean))
        square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
        return processor(square, return_tensors="pt")["pixel_values"]
    processor = load_processor(folder, name).image_processor
    made = processor([ImageOps.exif_transpose(Image.open(path))], return_tensors="pt")["pixel_values"]
    return torch.as_tensor(made)


@pytest.mark.parametrize("name", FAMILIES)
def test_pixel_values_of_every_kind_of_file_are_those_of_the_familys_own_processor(written, folder_of_kinds, name):
    folder = written(name)
    vlm = load_vlm(folder)
    preparer = Preparer.of(vlm, template=vlm.default_template, max_length=2048, image_root=folder_of_kinds)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a ball"}]
    for kind in KINDS:
        sample = parse_sample({"id": kind, "image": kind, "conversations": turns}, kind)
        ours, theirs = preparer(sample).input.images, reference_values(folder, name, folder_of_kinds / kind)
        assert ours.shape == theirs.reshape(ours.shape).shape, kind
        assert torch.equal(ours, theirs.reshape(ours.shape)), kind
        assert preparer.with_images(sample, preparer.text(sample)).input.images.equal(ours), kind
    if name in BY_PILLOW:
        assert len({values_of(preparer, f"orientation {n} JPEG", turns) for n in range(1, 9)}) == 1


def values_of(preparer, kind, turns):
    return preparer(parse_sample({"id": kind, "image": kind, "conversations": turns}, kind)).input.images.numpy().tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_in_a_files_header_is_that_of_the_upright_image(folder_of_kinds, kind):
    upright = ImageOps.exif_transpose(Image.open(folder_of_kinds / kind))
    assert image_size(folder_of_kinds / kind) == upright.size
    assert set(upright.size) == set(SIZE)


def test_an_orientation_behind_the_pixels_of_a_png_is_found(tmp_path):
    whole = KINDS["orientation 6 PNG"]()
    start = whole.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(whole[start : start + 4], "big")
    tail = whole.index(b"IEND") - 4
    moved = whole[:start] + whole[end:tail] + whole[start:end] + whole[tail:]
    (tmp_path / "x.png").write_bytes(moved)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(moved))).size == SIZE[::-1]
    assert image_size(tmp_path / "x.png") == SIZE[::-1]
