"""Pixel values of every kind of image file are those of the family's own processor, given what its own loader opens."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from checkpoints import FAMILIES
from image_kinds import KINDS, SIZE
from PIL import Image, ImageFile, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from alignkd.errors import SampleError
from alignkd.inputs.prompts import IGNORE, PromptError
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


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.without_image])
def test_an_image_tag_without_an_image_is_text_or_refused_where_it_is_a_special_token(written, name):
    vlm = load_vlm(written(name))
    encoder = vlm.encoder(vlm.default_template, 2048)
    turns = (("human", "Which SVG element shows a picture?"), ("gpt", "<image>, with an href"))
    if "<image>" in vlm.tokenizer.get_vocab():
        with pytest.raises(PromptError, match="special token '<image>'"):
            encoder.encode(turns, [])
        return
    made, _ = encoder.encode(turns, [])
    assert vlm.image_token_id not in made.input_ids.tolist()
    labels = made.labels[made.labels != IGNORE].tolist()
    assert "<image>, with an href" in vlm.tokenizer.decode(labels)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_in_a_files_header_is_that_of_the_upright_image(folder_of_kinds, kind):
    upright = ImageOps.exif_transpose(Image.open(folder_of_kinds / kind))
    assert image_size(folder_of_kinds / kind) == upright.size
    assert set(upright.size) == set(SIZE)


WIDE = (64_000, 900)
"""Few enough pixels for a file, far too many once padded to a square."""


def wide_image(folder, size):
    Image.new("1", size).save(folder / "wide.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a ball"}]
    return parse_sample({"id": "wide", "image": "wide.png", "conversations": turns}, "")


@pytest.mark.parametrize("use", ["whole", "text"])
@pytest.mark.parametrize(("name", "size"), [("mobilevlm_v1", WIDE), ("llava", (4_000_000, 16)), ("llava", (60_000_000, 1))])
def test_an_image_that_padding_or_resizing_makes_too_large_is_rejected_before_it_is_decoded(
    written, tmp_path, monkeypatch, name, size, use
):
    vlm = load_vlm(written(name))
    preparer = Preparer.of(vlm, template=vlm.default_template, max_length=2048, image_root=tmp_path)
    sample = wide_image(tmp_path, size)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was decoded"))
    monkeypatch.setattr(Image, "new", lambda *_: pytest.fail("its size was allocated"))
    if use == "whole":
        with pytest.raises(SampleError, match=r"wide\.png.*pixels, .* when .*, more than 134,217,728"):
            preparer(sample)
    elif vlm.encoder("v1", 2048).needs_sizes:
        with pytest.raises(SampleError, match=r"pixels, .* when .*, more than 134,217,728"):
            preparer.text(sample)


def test_several_images_that_become_squares_are_measured_as_squares(written, tmp_path):
    vlm = load_vlm(written("llava_onevision"))
    preparer = Preparer.of(vlm, template=vlm.default_template, max_length=2048, image_root=tmp_path)
    one = wide_image(tmp_path, (12_000, 8))
    two = replace(one, images=one.images * 2, turns=(("human", "<image><image>\nWhich?"), one.turns[1]))
    assert preparer(one).input.images.numel()
    for use in (preparer, preparer.text):
        with pytest.raises(SampleError, match="12,000 x 12,000 when padded to a square"):
            use(two)


def test_an_orientation_behind_the_pixels_of_a_png_is_found(tmp_path):
    whole = KINDS["orientation 6 PNG"]()
    start = whole.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(whole[start : start + 4], "big")
    tail = whole.index(b"IEND") - 4
    moved = whole[:start] + whole[end:tail] + whole[start:end] + whole[tail:]
    (tmp_path / "x.png").write_bytes(moved)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(moved))).size == SIZE[::-1]
    assert image_size(tmp_path / "x.png") == SIZE[::-1]
