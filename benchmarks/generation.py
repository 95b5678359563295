"""Questions a second: one question at a time, as LLaVA's loaders ask; ``alignkd evaluate``; and the runner of benchmarks.

The first prepares each picture and runs the tower for each question, with batches of one. All are greedy, in float32, and give
the same answers, which is checked on the questions that all of them are asked.

Example: python benchmarks/generation.py --model DEMO/teacher/student --data DEMO/data/test.json --images EASY_VQA/data
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.evaluate import EvaluateConfig
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.evaluate.benchmarks.llava import LlavaQuestions
from alignkd.pipeline.evaluate.runner import evaluate
from alignkd.pipeline.evaluate.running.answering import RunSettings, run_benchmark
from alignkd.pipeline.evaluate.running.generation import answer


def one_at_a_time(vlm: Vlm, arguments: argparse.Namespace) -> list[str]:
    """Each question alone, its picture read and encoded anew."""
    preparer = Preparer.of(vlm, template=vlm.default_template, max_length=2048, image_root=arguments.images)
    samples = SampleFile(arguments.data)
    return [
        answer(vlm, [preparer.question(samples[index])], arguments.new_tokens)[0]
        for index in range(min(arguments.alone, len(samples)))
    ]


def by_evaluate(arguments: argparse.Namespace) -> list[str]:
    """``alignkd evaluate``, the loading of the model included."""
    with tempfile.TemporaryDirectory() as folder:
        config = EvaluateConfig(
            model=arguments.model,
            data=arguments.data,
            images=arguments.images,
            out=folder,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.new_tokens,
        )
        evaluate(config)
        lines = (Path(folder) / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def by_runner(vlm: Vlm, arguments: argparse.Namespace) -> list[str]:
    """The runner of ``alignkd benchmark run``."""
    questions = LlavaQuestions.of(Path(arguments.data), Path(arguments.images), max_new_tokens=arguments.new_tokens)
    score = run_benchmark(vlm, questions, RunSettings(batch_tokens=arguments.batch_tokens))
    return [reading.prediction or "" for reading in score.readings]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--new-tokens", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=512, help="Of evaluate.")
    parser.add_argument("--batch-tokens", type=int, default=32_768, help="Of the runner.")
    parser.add_argument("--alone", type=int, default=300, help="Questions asked one at a time.")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    vlm = load_vlm(arguments.model)
    ways: dict[str, Callable[[], list[str]]] = {
        "one question at a time": lambda: one_at_a_time(vlm, arguments),
        "evaluate": lambda: by_evaluate(arguments),
        "benchmark runner": lambda: by_runner(vlm, arguments),
    }
    texts, rates = dict[str, list[str]](), dict[str, list[float]]()
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            texts[name] = way()
            rates.setdefault(name, []).append(len(texts[name]) / (time.perf_counter() - started))
    base = sorted(rates["one question at a time"])[arguments.rounds // 2]
    print("| | questions | questions/s, each round | of one at a time |\n|---|---|---|---|")
    for name, found in rates.items():
        median = sorted(found)[arguments.rounds // 2]
        print(f"| {name} | {len(texts[name]):,} | {', '.join(f'{rate:,.1f}' for rate in found)} | {median / base:.1f} |")
    asked = len(texts["one question at a time"])
    same = all(found[:asked] == texts["one question at a time"] for found in texts.values())
    print(f"the first {asked} answers are {'the same' if same else 'NOT the same'}")


if __name__ == "__main__":
    main()
