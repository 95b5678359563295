"""A run goes on from a checkpoint where the output head is the embedding, which a checkpoint holds once."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file
from test_families_end_to_end import write_data

from alignkd.losses.recipes import get_recipe
from alignkd.models.loading import load_vlm
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.stage_one.worker import cache_teacher
from alignkd.pipeline.training.checkpoints import find_latest, mark_complete
from alignkd.pipeline.training.run import distill


@pytest.fixture(scope="module")
def run(written, tmp_path_factory):
    """Three finished steps with a checkpoint after each, and the digest of what they gave."""
    folder = tmp_path_factory.mktemp("run")
    data, _ = write_data("gemma3", folder)
    cache_teacher(
        CacheTeacherConfig(
            teacher=str(written("gemma3", 0)), data=data, images=str(folder), cache=str(folder / "cache"), device="cpu"
        )
    )
    config = DistillConfig(
        student=str(written("gemma3", 1)),
        data=data,
        images=str(folder),
        out=str(folder / "out"),
        recipe=get_recipe("align-kd"),
        cache=str(folder / "cache"),
        max_steps=3,
        batch_size=2,
        learning_rate=1e-2,
        save_steps=1,
        save_total_limit=3,
        workers=0,
        device="cpu",
        report_to=(),
    )
    distill(config)
    return config, load_vlm(folder / "out" / "student").weights_fingerprint()


def first_step_of(run, folder):
    """The run as it was after its first step, to go on with in another folder."""
    config, _ = run
    shutil.copytree(config.out, folder, ignore=shutil.ignore_patterns("checkpoint-[23]", "student", "result.json"))
    return replace(config, out=str(folder), resume=True)


def test_resuming_with_tied_weights_gives_the_same_student(run, tmp_path):
    config = first_step_of(run, tmp_path / "out")
    assert not (tmp_path / "out" / "student").exists()
    distill(config)
    student = load_vlm(tmp_path / "out" / "student")
    assert student.weights_fingerprint() == run[1]
    assert student.head.weight.data_ptr() == student.model.get_input_embeddings().weight.data_ptr()


def test_resuming_from_a_checkpoint_that_lacks_weights_is_refused(run, tmp_path):
    config = first_step_of(run, tmp_path / "out")
    checkpoint, state = find_latest(tmp_path / "out" / "checkpoints")
    weights = load_file(checkpoint / "model.safetensors")
    lost = next(name for name in weights if name.endswith("norm.weight"))
    kept = {name: value for name, value in weights.items() if name != lost}
    save_file(kept, checkpoint / "model.safetensors", metadata={"format": "pt"})
    mark_complete(checkpoint, state)
    with pytest.raises(ValueError, match="does not hold this student's weights"):
        distill(config)
