"""examples/vlmevalkit_model.py against a stub of VLMEvalKit's interface, with a run.py that asks the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import IMAGES, STUDENT

from alignkd.models.loading import load_vlm
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.sample import read_sample
from alignkd.pipeline.evaluate.running.generation import answer

EXAMPLE = Path(__file__).parents[2] / "examples" / "vlmevalkit_model.py"
STUB = {
    "vlmeval/__init__.py": "",
    "vlmeval/vlm/__init__.py": "",
    "vlmeval/config.py": "supported_VLM = {}\n",
    "vlmeval/vlm/base.py": "class BaseModel:\n    INTERLEAVE = False\n\n    def generate(self, message, dataset=None):\n"
    "        return self.generate_inner(message, dataset)\n",
    "run.py": """
import json, sys
from vlmeval.config import supported_VLM

model = supported_VLM["alignkd"](max_new_tokens=6)
print(json.dumps({"options": sys.argv[1:], "answers": [model.generate(one, dataset="POPE") for one in json.load(sys.stdin)]}))
""",
}


@pytest.mark.slow
def test_it_answers_as_evaluate_does_and_hands_its_other_options_to_run_py(tmp_path):
    for name, text in STUB.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    picture = str(IMAGES / "0.png")
    asked = {"type": "text", "value": "What is it?"}
    messages = [[{"type": "image", "value": picture}, asked], [asked]]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(STUDENT), "--data", "POPE", "--model", "alignkd"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        input=json.dumps(messages),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["options"] == ["--data", "POPE", "--model", "alignkd"]
    vlm = load_vlm(STUDENT)
    preparer = Preparer.of(vlm, template="v1", max_length=2048, image_root="/")
    for record, found in zip(({"image": picture}, {}), said["answers"], strict=True):
        text = ("<image>\n" if record else "") + asked["value"]
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "?"}]
        sample = read_sample({"id": "a", **record, "conversations": turns})
        assert found == answer(vlm, [preparer.question(sample)], 6)[0]
