"""MobileVLM V1: its projector restated, the official layout, the slice, and V1 and V2 as each other's teacher."""

from __future__ import annotations

import json

import make_mobilevlm_v1
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_families_end_to_end import write_data
from torch.nn import functional

from alignkd.capture.attention import capture
from alignkd.capture.teacher_slice import TeacherSlice, slice_config, slice_tensors
from alignkd.losses.recipes import get_recipe
from alignkd.models.loading import load_vlm, save_vlm
from alignkd.models.modules.ldpv1 import LdpV1Projector
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.stage_one.worker import cache_teacher
from alignkd.pipeline.training.run import distill

TURNS = [("human", "<image>\nWhat is it?"), ("gpt", "a dog")]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The official folder and its weights."""
    folder = tmp_path_factory.mktemp("v1") / "official"
    return folder, make_mobilevlm_v1.write_official(folder)


def restated(state, features):
    """The projector on one image's features ``[P, C]``, cell by cell."""
    w = {k.removeprefix("model.mm_projector.model."): v for k, v in state.items() if "mm_projector" in k}

    def linear(x, name):
        return x @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]

    def norm(x, name):  # over the channels of each cell
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def depthwise(x, kernel, stride):
        side, width = x.shape[0], x.shape[2]
        padded = torch.zeros(side + 2, side + 2, width)
        padded[1:-1, 1:-1] = x
        rows = []
        for i in range(0, side, stride):
            cells = [(padded[i : i + 3, j : j + 3] * kernel).sum((0, 1)) for j in range(0, side, stride)]
            rows.append(torch.stack(cells))
        return torch.stack(rows)

    x = linear(functional.gelu(linear(features, "mlp.1")), "mlp.3")
    side = round(len(x) ** 0.5)
    x = x.reshape(side, side, -1)
    for block, stride in (("mb_block.1.block", 1), ("mb_block.2.block", 2)):
        y = norm(depthwise(x, w[f"{block}.0.0.weight"][:, 0].permute(1, 2, 0), stride), f"{block}.0.1")
        y = y * (y + 3).clamp(0, 6) / 6
        excited = linear(linear(y.mean((0, 1)), f"{block}.1.fc1").clamp(min=0), f"{block}.1.fc2")
        y = y * ((excited + 3).clamp(0, 6) / 6)
        y = norm(y @ w[f"{block}.2.0.weight"].flatten(1).T, f"{block}.2.1")
        x = x + y if stride == 1 else y
    return x.flatten(0, 1)


def test_the_projector_gives_the_values_of_the_restatement(official):
    folder, state = official
    vlm = load_vlm(folder)
    with torch.no_grad():
        features = vlm.model.model.run_tower(torch.randn(2, 3, 64, 64))
        found = vlm.model.model.project(features)
        assert found.shape == (2, 16, 32)
        for one, expected in zip(found, features, strict=True):
            torch.testing.assert_close(one, restated(state, expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "reduced"), [(2048, 512), (2560, 640), (40, 16), (16, 8)])
def test_a_quarter_of_the_channels_is_rounded_as_mobilenets_round(width, reduced):
    with torch.device("meta"):
        projector = LdpV1Projector(8, width)
    assert projector.state_dict()["model.mb_block.1.block.1.fc1.weight"].shape == (reduced, width, 1, 1)


def test_clips_576_patches_become_144_vision_tokens():
    assert LdpV1Projector(8, 16)(torch.randn(1, 576, 8)).shape == (1, 144, 16)


def test_the_official_layout_survives_loading_and_saving(official, tmp_path):
    folder, state = official
    vlm = load_vlm(folder)
    save_vlm(vlm, tmp_path / "ours")
    save_vlm(load_vlm(tmp_path / "ours"), tmp_path / "official", official=True)
    saved = load_file(tmp_path / "official" / "model.safetensors")
    assert set(saved) == set(state)
    assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
    written = json.loads((tmp_path / "official" / "config.json").read_text())
    assert (written["mm_projector_type"], written["vision_tower_type"]) == ("ldpnet", "clip")
    again = load_vlm(tmp_path / "official")
    assert again.weights_fingerprint() == vlm.weights_fingerprint()
    assert again.image_fingerprint() == vlm.image_fingerprint()


def test_weights_of_another_projector_are_refused_by_name(tmp_path):
    make_mobilevlm_v1.write_official(tmp_path / "model", projector="ldpnetv2")
    with pytest.raises(ValueError, match=r"lack model\.multi_modal_projector\.mlp\.mlp\.0\.bias"):
        load_vlm(tmp_path / "model")


def test_an_unknown_projector_is_refused_with_those_that_are_known(tmp_path):
    make_mobilevlm_v1.write_official(tmp_path / "model", projector="mlp2x_gelu")
    with pytest.raises(ValueError, match="'mlp2x_gelu'; known are 'ldpnet'"):
        load_vlm(tmp_path / "model")


def test_its_slice_gives_the_targets_of_the_whole_teacher(official):
    vlm = load_vlm(official[0])
    encoder = vlm.encoder("v1", 512)
    made, _ = encoder.finish(TURNS, encoder.plan(TURNS, 1), [encoder.load(_picture())])
    batch = vlm.collate([made])
    whole = TeacherSlice(slice_config(vlm.model), slice_tensors(vlm, tower=True))
    with torch.no_grad():
        expected = capture(vlm, batch)
    attention, vision = whole.targets(batch)
    torch.testing.assert_close(attention, expected.attention[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(vision, expected.vision_BVD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "value"), [("projector_type", "ldpnet3"), ("projector_type", 1), ("projector_grid", 5)])
def test_the_description_of_a_slice_with_another_projector_is_refused(official, name, value):
    vlm = load_vlm(official[0])
    description = slice_config(vlm.model)
    description["features"][name] = value
    with pytest.raises(ValueError, match=f"not the configuration of a teacher's slice.*{name} is"):
        TeacherSlice(description, slice_tensors(vlm, tower=True))


def _picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))


@pytest.mark.parametrize("alignment", ["targets", "slice"])
@pytest.mark.parametrize("teacher", ["ldpnet", "ldpnetv2"])
def test_each_generation_teaches_the_other(tmp_path, teacher, alignment):
    for name in ("ldpnet", "ldpnetv2"):
        _write_generation(tmp_path / name, name)
    data, samples = write_data("mobilevlm_v1", tmp_path)
    student = "ldpnetv2" if teacher == "ldpnet" else "ldpnet"
    cache = str(tmp_path / "cache")
    cache_teacher(
        CacheTeacherConfig(
            teacher=str(tmp_path / teacher),
            data=data,
            images=str(tmp_path),
            cache=cache,
            alignment=alignment,
            device="cpu",
            max_rejected=0,
        )
    )
    config = DistillConfig(
        student=str(tmp_path / student),
        data=data,
        images=str(tmp_path),
        out=str(tmp_path / "out"),
        recipe=get_recipe("align-kd"),
        cache=cache,
        max_steps=3,
        batch_size=samples,
        learning_rate=1e-2,
        warmup=0.0,
        log_steps=1,
        workers=0,
        device="cpu",
        report_to=(),
        max_rejected=0,
    )
    distill(config)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["attention"] > 0 and line["vision_all"] > 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    written = json.loads((tmp_path / "out" / "student-official" / "config.json").read_text())
    assert written["mm_projector_type"] == student


def _write_generation(folder, projector):
    """A checkpoint of either generation on the same grid of 4 x 4."""
    state = make_mobilevlm_v1.write_official(folder, seed=len(projector), projector=projector)
    if projector == "ldpnet":
        return
    kept = {k: v for k, v in state.items() if "mm_projector" not in k}
    prefix = "model.mm_projector."
    kept |= {f"{prefix}mlp.mlp.0.weight": torch.randn(32, 16), f"{prefix}mlp.mlp.0.bias": torch.randn(32)}
    kept |= {f"{prefix}mlp.mlp.2.weight": torch.randn(32, 32) / 6, f"{prefix}mlp.mlp.2.bias": torch.randn(32)}
    kept |= {f"{prefix}peg.peg.0.weight": torch.randn(32, 1, 3, 3) / 3, f"{prefix}peg.peg.0.bias": torch.randn(32)}
    torch.save(kept, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_projector_grid": 4}))
