"""lmms-eval, installed in an environment of its own, runs from its own command line to a score on a local task."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_installed_wheel import folder, wheel  # noqa: F401  fixtures
from tiny_runs import GOLDEN, IMAGES, STUDENT

from alignkd.models.loading import load_vlm
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.sample import read_sample
from alignkd.pipeline.evaluate.running.generation import answer

pytestmark = pytest.mark.slow

TASK = GOLDEN.parent / "lmms_eval"
NEEDED = ["datasets", "evaluate", "sacrebleu", "pytablewriter", "tenacity", "loguru", "jinja2", "pytz", "filelock<4"]
"""What lmms-eval's command line imports, and alignkd does not."""
QUESTIONS = [("What is it?", "0.png"), ("Which colour has it?", "1.png"), ("Why?", "2.png"), ("And where is it?", "3.png")]


@pytest.fixture
def program(folder, wheel):  # noqa: F811
    """Python of an environment with lmms-eval and alignkd's wheel; torch and the like are those of this one."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    for words in (["--no-deps", "lmms-eval==0.7.3"], NEEDED, ["--no-deps", wheel]):
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", *words], capture_output=True, text=True)
        if done.returncode and "alignkd" not in str(words[-1]):
            pytest.skip(f"the package registry cannot be reached: {done.stderr.strip()[-300:]}")
        assert done.returncode == 0, done.stderr
    found = subprocess.run([python, "-c", "import torchvision"], capture_output=True, text=True)
    assert "ModuleNotFoundError" in found.stderr, "lmms-eval needs no torchvision, and none was installed"
    return python


@pytest.fixture
def task(folder):  # noqa: F811
    """The task's folder: half of the expected answers are the model's own, so the score is one half if they agree."""
    place = Path(shutil.copytree(TASK, folder / "task"))
    vlm = load_vlm(STUDENT)
    preparer = Preparer.of(vlm, template="v1", max_length=2048, image_root=IMAGES)
    documents = []
    for number, (text, name) in enumerate(QUESTIONS):
        turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "?"}]
        sample = read_sample({"id": "a", "image": name, "conversations": turns})
        (expected,) = answer(vlm, [preparer.question(sample)], 6)
        documents.append(
            {"question": text, "images": [str(IMAGES / name)], "answer": expected if number % 2 else f"not {expected}"}
        )
    (place / "questions.json").write_text(json.dumps(documents))
    return place, [document["answer"].removeprefix("not ") for document in documents]


def score(program, place, out, *before, size=3):
    """The score and the answers that lmms-eval writes."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hf"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = ["--model", "alignkd", "--model_args", f"pretrained={STUDENT}", "--tasks", "local_questions", "--include_path", "."]
    words += ["--batch_size", str(size), "--device", "cpu", "--output_path", str(out), "--log_samples"]
    done = subprocess.run(
        [str(program), *before, "-m", "lmms_eval", *words], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    (results,) = out.rglob("*results.json")
    (samples,) = out.rglob("*samples_local_questions.jsonl")
    lines = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    return json.loads(results.read_text())["results"]["local_questions"]["right,none"], lines


def test_lmms_eval_scores_a_local_task_in_one_process_and_in_two(program, task, tmp_path):
    """One test, as its environment takes a minute to install."""
    place, expected = task
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    for name, before in (("one", []), ("two", launcher)):
        found, lines = score(program, place, tmp_path / name, *before)
        assert found == 0.5, name
        assert [line["filtered_resps"] for line in lines] == expected, name
