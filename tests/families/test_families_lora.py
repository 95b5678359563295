"""A LoRA run's adapter, read by PEFT's own convention on its base, is the student that the run wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from checkpoints import FAMILIES
from peft import PeftModel
from safetensors import safe_open
from test_families_end_to_end import write_data

from alignkd.losses.recipes import get_recipe
from alignkd.models.loading import load_vlm
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.training.run import distill

QUICK = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "mobilevlm_v1")
PLAIN = """
import sys
sys.modules["alignkd"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
for base, run in zip(sys.argv[1::2], sys.argv[2::2]):
    adapted = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), run + "/adapter")
    found = adapted.merge_and_unload().state_dict()
    wanted = AutoModelForImageTextToText.from_pretrained(run + "/student").state_dict()
    assert found.keys() == wanted.keys()
    assert not [name for name in wanted if (found[name] - wanted[name]).abs().max() > 1e-6]
"""


def train_lora(name, base, folder):
    """A few steps of plain fine-tuning by low-rank updates: no teacher is needed to move every part that trains."""
    data, samples = write_data(name, folder)
    config = DistillConfig(
        student=str(base),
        data=data,
        images=str(folder),
        out=str(folder / "out"),
        recipe=get_recipe("sft"),
        lora=True,
        lora_rank=4,
        max_steps=3,
        batch_size=samples,
        learning_rate=1e-2,
        warmup=0.0,
        workers=0,
        device="cpu",
        report_to=(),
    )
    distill(config)
    return folder / "out"


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_base_and_adapter_are_the_trained_student(name, written, tmp_path):
    base = written(name, 1)
    out = train_lora(name, base, tmp_path)
    start, vlm = load_vlm(base), load_vlm(base)
    found = PeftModel.from_pretrained(vlm.model, str(out / "adapter")).merge_and_unload().state_dict()
    student = load_vlm(out / "student")
    wanted = student.model.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if (found[name] - wanted[name]).abs().max() > 1e-6] == []
    moved = zip(start.projector.parameters(), student.projector.parameters(), strict=True)
    assert any(not torch.equal(before, after) for before, after in moved)
    assert torch.equal(start.head.weight, student.head.weight)
    described = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == os.path.abspath(base)
    with safe_open(out / "adapter" / "adapter_model.safetensors", "pt") as file:
        stored = set(file.keys())
    whole = tuple(f"base_model.model.{module}." for module in described["modules_to_save"])
    assert all(".lora_" in key or key.startswith(whole) for key in stored)
    card = (out / "adapter" / "README.md").read_text()
    assert f"base_model: {os.path.abspath(base)}" in card
    assert all(f"`{module}`" in card for module in described["modules_to_save"])


@pytest.mark.slow
@pytest.mark.processes
def test_an_adapter_of_a_family_of_transformers_needs_no_alignkd(written, tmp_path):
    arguments = []
    for name in ("llava", "qwen2_5_vl"):
        (tmp_path / name).mkdir()
        arguments += [str(written(name, 1)), str(train_lora(name, written(name, 1), tmp_path / name))]
    done = subprocess.run([sys.executable, "-c", PLAIN, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
