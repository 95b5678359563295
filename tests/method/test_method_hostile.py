"""Other people's files: images and checkpoints that are damaged, wrong or malicious are refused with a clear message."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import GOLDEN, TOWER_PREFIX, VOCABULARY, change_config, write_checkpoint

from alignkd.models.encoders import image_files
from alignkd.models.encoders.image_files import ImageError, decode_image, read_image_bytes
from alignkd.models.encoders.images import ImagePreprocessor, to_display
from alignkd.models.loading import load_vlm, save_vlm


def png(width=6, height=4, mode="RGB"):
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 60).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def png_header(width, height):
    """A valid PNG header that promises width x height pixels and holds none."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


# --- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8_001, 30_000, 2**31 - 1])
def test_an_image_of_too_many_pixels_is_refused_by_its_header(side):
    with pytest.raises(ImageError, match=r"bomb\.png"):
        decode_image(png_header(side, side), "bomb.png")


def test_an_image_just_too_large_names_its_size_and_the_limit(monkeypatch):
    monkeypatch.setattr(image_files, "MAX_IMAGE_PIXELS", 24)
    assert decode_image(png(6, 4), "x").size == (6, 4)
    with pytest.raises(ImageError, match="x: 5 x 5 pixels, more than 24"):
        decode_image(png(5, 5), "x")


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a", png()[:-30], png()[:20], png_header(0, 5)],
    ids=["empty", "text", "svg", "gif header", "truncated", "header cut", "no width"],
)
def test_what_is_no_readable_image_is_refused_by_name(data):
    with pytest.raises(ImageError, match=r"photo\.png"):
        decode_image(data, "photo.png")


@settings(max_examples=60)
@given(st.integers(0, 200), st.integers(0, 255), st.integers(0, 200))
def test_a_damaged_image_is_an_image_or_an_image_error(place, value, length):
    data = bytearray(png(16, 16))
    data[place % len(data)] = value
    with contextlib.suppress(ImageError):
        assert decode_image(bytes(data[: len(data) - length]), "x").mode == "RGB"


def test_a_missing_file_a_folder_and_a_huge_file_are_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(ImageError, match=r"none\.png.*No such file"):
        read_image_bytes(tmp_path / "none.png")
    with pytest.raises(ImageError, match=tmp_path.name):
        read_image_bytes(tmp_path)
    monkeypatch.setattr(image_files, "MAX_IMAGE_BYTES", 10)
    (tmp_path / "large.png").write_bytes(b"x" * 11)
    with pytest.raises(ImageError, match=r"large\.png: 11 bytes, more than the 10"):
        read_image_bytes(tmp_path / "large.png")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK", "LA"])
@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_images_of_every_mode_become_pixel_values(golden_models, mode, aspect_ratio):
    buffer = io.BytesIO()
    if mode == "I;16":
        Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6)).save(buffer, "PNG")
    else:
        Image.effect_noise((6, 4), 60).convert(mode).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    processor = ImagePreprocessor(golden_models["student"].images.settings, aspect_ratio)
    values = processor(decode_image(buffer.getvalue(), "x"))
    assert values.shape == (3, 48, 48)
    assert values.isfinite().all()


@pytest.mark.parametrize("size", [(48, 48), (1, 1), (200, 3), (3, 200)])
def test_padding_makes_any_shape_square_with_the_mean_colour(golden_models, size):
    processor = golden_models["student"].images
    picture = to_display(processor(Image.new("RGB", size, (255, 0, 0))), processor)
    assert picture.shape == (48, 48, 3)
    if size[0] == size[1]:
        np.testing.assert_allclose(picture, np.broadcast_to([1, 0, 0], (48, 48, 3)), atol=1e-5)
    else:
        np.testing.assert_allclose(picture[0, 0], np.array([122, 116, 104]) / 255, atol=1e-5)
        np.testing.assert_allclose(picture[-1, -1], np.array([122, 116, 104]) / 255, atol=1e-5)


def test_the_image_fingerprint_follows_every_setting(golden_models):
    processor = golden_models["student"].images
    assert ImagePreprocessor(dict(processor.settings), "pad").fingerprint() == processor.fingerprint()
    assert ImagePreprocessor(processor.settings, "square").fingerprint() != processor.fingerprint()
    changed = {**processor.settings, "image_mean": [0.5, 0.5, 0.5]}
    assert ImagePreprocessor(changed, "pad").fingerprint() != processor.fingerprint()


# --- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def ours(folder, tmp_path):
    """The same model as alignkd saves it."""
    save_vlm(load_vlm(folder), tmp_path / "ours")
    return tmp_path / "ours"


class Attack:
    """What a malicious pickle does: call something when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "old", "raw pickle"])
@pytest.mark.parametrize("where", ["checkpoint", "shard", "tower"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(folder, tmp_path, form, where):
    payload = {"model.norm.weight": torch.ones(24), "x": Attack(tmp_path / "ran")}
    target = folder / "pytorch_model.bin"
    if where == "tower":
        state = torch.load(target, weights_only=True)
        torch.save({k: v for k, v in state.items() if not k.startswith(TOWER_PREFIX)}, target)
        target = folder / "clip" / "pytorch_model.bin"
    elif where == "shard":
        target.unlink()
        target = folder / "shard.bin"
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "shard.bin"}}))
    if form == "raw pickle":
        target.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, target, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        load_vlm(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_a_folder_of_ours_is_refused_and_not_run(ours, tmp_path):
    (ours / "model.safetensors").unlink()
    torch.save({"x": Attack(tmp_path / "ran")}, ours / "pytorch_model.bin")
    with pytest.raises(ValueError, match="ours"):
        load_vlm(ours)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shard", ["../outside.bin", "/outside.bin", "sub/inside.bin", "..", ""])
def test_an_index_that_names_a_file_elsewhere_is_refused(folder, shard):
    (folder / "pytorch_model.bin").rename(folder.parent / "outside.bin")
    (folder / "sub").mkdir()
    shutil.copyfile(folder.parent / "outside.bin", folder / "sub" / "inside.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(ValueError, match=r"shard|missing"):
        load_vlm(folder)


def test_an_index_of_ours_that_names_a_file_elsewhere_is_refused(ours):
    (ours / "model.safetensors").rename(ours.parent / "outside.safetensors")
    where = dict.fromkeys(load_file(ours.parent / "outside.safetensors"), "../outside.safetensors")
    (ours / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    with pytest.raises(ValueError, match="outside"):
        load_vlm(ours)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'],
    ids=["no json", "list", "no map", "number", "number in map"],
)
def test_an_index_that_is_no_index_is_refused(folder, text):
    (folder / "pytorch_model.bin.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json"):
        load_vlm(folder)


def test_a_missing_shard_is_refused_by_name(folder):
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "part-2.bin"}}))
    with pytest.raises(ValueError, match=r"part-2\.bin.* missing"):
        load_vlm(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_a_damaged_weight_file_is_refused_by_name(folder, name, damage):
    path = folder / name
    if name == "model.safetensors":
        save_file(torch.load(folder / "pytorch_model.bin", weights_only=True), path)
        (folder / "pytorch_model.bin").unlink()
    data = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"version https://git-lfs.github.com/spec/v1", "cut": data[: len(data) // 2]}[damage]
    )
    with pytest.raises(ValueError, match=f"{name} cannot be read as tensors"):
        load_vlm(folder)


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), 3], ids=["list", "tensor", "number"])
def test_a_weight_file_that_holds_no_named_tensors_is_refused_by_name(folder, content):
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        load_vlm(folder)


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load_vlm(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is not a folder"):
        load_vlm(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is not a checkpoint: it holds no config\.json"):
        load_vlm(tmp_path / "empty")


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "expected an object"), ("", "is not JSON")])
def test_a_configuration_that_is_no_object_is_refused(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        load_vlm(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', which is no vision-language model"),
        ({"model_type": ...}, "names no model_type"),
        ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type is 'mlp2x_gelu'; known are 'ldpnet'"),
        ({"mm_projector_type": ...}, "mm_projector_type is None"),
        ({"mm_vision_tower": ...}, "names no mm_vision_tower"),
        ({"mm_vision_tower": "google/siglip"}, "'google/siglip' is not a local folder.*--vision-tower"),
        ({"vocab_size": 500}, "lm_head.weight is|embed_tokens.weight is"),
        ({"hidden_size": 32}, r"do not match the configuration: .* is \(.*\), expected \("),
        ({"num_hidden_layers": 3}, r"the weights lack model\.language_model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"the weights also hold model\.language_model\.layers\.1"),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_a_configuration_that_does_not_fit_is_refused_with_what_was_found_and_expected(folder, change, message):
    change_config(folder, **change)
    with pytest.raises(ValueError, match=message):
        load_vlm(folder)


def test_a_folder_without_tokenizer_or_with_a_broken_one_is_refused(folder):
    (folder / "tokenizer.model").write_bytes(b"broken")
    with pytest.raises(ValueError, match="the tokenizer cannot be read"):
        load_vlm(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"model holds no tokenizer: expected tokenizer\.model or tokenizer\.json"):
        load_vlm(folder)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    write_checkpoint(tmp_path / "small", vocab_size=400)
    with pytest.raises(ValueError, match="the tokenizer has 512 tokens but the model 400"):
        load_vlm(tmp_path / "small")


def test_a_folder_without_weights_is_refused(folder):
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        load_vlm(folder)


def edit(path, change):
    """Change a weight file's tensors in place."""
    if path.suffix == ".safetensors":
        state = {k: v.clone() for k, v in load_file(path).items()}
        change(state)
        save_file(state, path, metadata={"format": "pt"})
    else:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)


@pytest.mark.parametrize("layout", ["official", "hugging-face"])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda s: s.pop("lm_head.weight"), "lm_head"),
        (lambda s: s.update({"model.norm.gamma": torch.ones(24)}), "gamma"),
        (lambda s: s.update({"lm_head.weight": torch.ones(VOCABULARY, 23)}), "lm_head"),
    ],
    ids=["lack", "another", "other shape"],
)
def test_weights_that_lack_a_tensor_hold_another_or_have_another_shape_are_refused(folder, ours, layout, change, word):
    path = folder / "pytorch_model.bin" if layout == "official" else ours / "model.safetensors"
    edit(path, change)
    with pytest.raises(ValueError, match=word):
        load_vlm(path.parent)


def test_tied_weights_that_lack_their_embedding_are_refused(tmp_path):
    write_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    edit(tmp_path / "model" / "pytorch_model.bin", lambda s: s.pop("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match="embed_tokens"):
        load_vlm(tmp_path / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json"])
def test_a_folder_of_ours_that_lacks_a_file_is_refused_by_name(ours, name):
    (ours / name).unlink()
    with pytest.raises(ValueError, match=r"safetensors|preprocessor_config\.json"):
        load_vlm(ours)


def test_a_tower_folder_without_weights_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "student", tmp_path / "student")
    shutil.copytree(GOLDEN / "clip", tmp_path / "clip")
    (tmp_path / "clip" / "pytorch_model.bin").unlink()
    edit(tmp_path / "student" / "pytorch_model.bin", lambda s: [s.pop(k) for k in list(s) if k.startswith(TOWER_PREFIX)])
    with pytest.raises(ValueError, match="clip holds no weights"):
        load_vlm(tmp_path / "student")
