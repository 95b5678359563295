"""Pixel values of every kind of image file are those of the family's own processor, given what its own loader opens."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoints import FAMILIES
from image_kinds import KINDS, SIZE
from PIL import Image, ImageFile, ImageOps
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from alignkd.errors import CheckpointError, SampleError
from alignkd.inputs.prompts import IGNORE, PromptError
from alignkd.models.encoders.image_files import image_size
from alignkd.models.encoders.pillow_rgb import rgb_by_pillow, what_is_lost
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
@pytest.mark.parametrize(("name", "size"), [("mobilevlm_v1", WIDE), ("llava", (65_000, 1)), ("llava", (1, 65_000))])
def test_an_image_that_padding_or_resizing_makes_too_large_is_rejected_before_it_is_decoded(
    written, tmp_path, monkeypatch, name, size, use
):
    folder = written(name)
    if name == "llava":
        folder = settings_of_images(tmp_path / "large", written, name, {"size": {"shortest_edge": 336}})
    vlm = load_vlm(folder)
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


EXTREME = [(16_000, 1), (1, 16_000), (1, 1)]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_of_any_shape_has_pixel_values_or_is_rejected(written, tmp_path, name):
    vlm = load_vlm(written(name))
    preparer = Preparer.of(vlm, template=vlm.default_template, max_length=2048, image_root=tmp_path)
    for size in EXTREME:
        sample = wide_image(tmp_path, size)
        for use in (preparer, preparer.text):
            with contextlib.suppress(SampleError):
                use(sample)
    with pytest.raises(SampleError, match="65536 x 1 pixels, a side of more than 65,535"):
        preparer(wide_image(tmp_path, (65_536, 1)))


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


def settings_of_images(folder, written, name, changes):
    shutil.copytree(written(name), folder)
    path = folder / "processor_config.json"
    content = json.loads(path.read_text())
    content["image_processor"] |= changes
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_edges_that_count_pixels_may_be_as_large_as_released_checkpoints_have_them(written, tmp_path, name):
    released = {"longest_edge": 16_777_216, "shortest_edge": 65_536}
    folder = settings_of_images(tmp_path / "a", written, name, {"size": released})
    assert load_processor(folder, name).image_processor.size.shortest_edge == 65_536


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3_vl", {"size": {"longest_edge": 2**40, "shortest_edge": 64}}, "longest_edge of the image processor's size"),
        ("llava", {"size": {"shortest_edge": 2**20}}, "shortest_edge of the image processor's size"),
        ("llava", {"crop_size": {"height": 2**20, "width": 32}}, "height of the image processor's crop_size"),
        ("llava_next", {"image_grid_pinpoints": [[32, 2**30]]}, "a side in the image processor's image_grid_pinpoints"),
        ("internvl", {"max_patches": 2**30}, "max_patches of the image processor"),
        ("idefics3", {"max_image_size": {"longest_edge": 2**30}}, "longest_edge of the image processor's max_image_size"),
        ("qwen3_vl", {"patch_size": -4}, "patch_size of the image processor"),
    ],
)
def test_settings_that_would_fill_the_memory_with_one_image_are_refused_by_name(written, tmp_path, name, changes, message):
    folder = settings_of_images(tmp_path / "a", written, name, changes)
    with pytest.raises(CheckpointError, match=f"{message} is .*, expected a whole number from 1 to"):
        load_processor(folder, name)


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("16 bit PNG", "its values reach 65535, and RGB cuts them at 255"),
        ("32 bit TIFF", "its values reach 65535"),
        ("float TIFF", "as RGB all of it has one value"),
        ("RGB PNG", ""),
        ("RGBA PNG", ""),
    ],
)
def test_an_image_that_loses_what_it_shows_is_told_from_others(folder_of_kinds, kind, lost):
    image = Image.open(folder_of_kinds / kind)
    found = what_is_lost(image, rgb_by_pillow(image))
    assert found.startswith(lost)
    assert bool(found) is bool(lost)


def test_images_of_one_value_are_counted_in_a_warning_each_once(written, tmp_path, caplog):
    vlm = load_vlm(written("llava"))
    preparer = Preparer.of(vlm, template=vlm.default_template, max_length=2048, image_root=tmp_path)
    sample = wide_image(tmp_path, (40, 30))
    preparer(sample)
    preparer(sample)
    assert caplog.text.count("images that show little or nothing so far: 1; the last one is wide.png") == 1
    # A drawing in white that is laid on white.
    drawing = Image.new("RGBA", (40, 30), (255, 255, 255, 0))
    drawing.paste((255, 255, 255, 255), (5, 5, 20, 20))
    for number in range(9):
        drawing.save(tmp_path / f"{number}.png")
        preparer(replace(sample, images=(f"{number}.png",)))
    assert "so far: 10; the last one is 8.png: as RGB all of it has one value (the file's mode is RGBA)" in caplog.text


def test_a_processor_that_converts_nothing_is_given_what_transformers_loader_gives(written, tmp_path, folder_of_kinds):
    folder = settings_of_images(tmp_path / "a", written, "llava", {"do_convert_rgb": False})
    vlm = load_vlm(folder)
    preparer = Preparer.of(vlm, template=vlm.default_template, max_length=2048, image_root=folder_of_kinds)
    for kind in ("RGBA PNG", "palette with alpha PNG", "orientation 6 JPEG", "16 bit PNG", "grey PNG"):
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a ball"}]
        ours = preparer(parse_sample({"id": kind, "image": kind, "conversations": turns}, kind)).input.images
        image = load_image(str(folder_of_kinds / kind))
        theirs = vlm.processor.image_processor([image], return_tensors="pt")["pixel_values"]
        assert torch.equal(ours, theirs.reshape(ours.shape)), kind
