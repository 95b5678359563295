"""Questions a second: one question at a time, as LLaVA's loaders ask; ``alignkd evaluate``; and the runner of benchmarks.

The first prepares each picture and runs the tower for each question, with batches of one, with one thread and with as many as
there are processors. The last is the runner in as many processes of one thread each, which have loaded the model. All are
greedy, in float32, and give the same answers, which is checked on the questions that all of them are asked.

Example: python benchmarks/generation.py --model DEMO/teacher/student --data DEMO/data/test.json --images EASY_VQA/data
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from alignkd.models.loading import load_vlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.evaluate import EvaluateConfig
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.evaluate.benchmarks.llava import LlavaQuestions
from alignkd.pipeline.evaluate.runner import evaluate
from alignkd.pipeline.evaluate.running.answering import Answering, RunSettings, run_benchmark
from alignkd.pipeline.evaluate.running.generation import answer
from alignkd.pipeline.evaluate.running.schedule import share_of
from alignkd.pipeline.runtime.ranks import Worker


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


def questions_of(arguments: argparse.Namespace) -> LlavaQuestions:
    """The data as a benchmark."""
    return LlavaQuestions.of(Path(arguments.data), Path(arguments.images), max_new_tokens=arguments.new_tokens)


def by_runner(vlm: Vlm, arguments: argparse.Namespace) -> list[str]:
    """The runner of ``alignkd benchmark run``."""
    score = run_benchmark(vlm, questions_of(arguments), RunSettings(batch_tokens=arguments.batch_tokens))
    return [reading.prediction or "" for reading in score.readings]


class Processes:
    """Processes of one thread, which have loaded the model: each answers its share of the questions whenever it is told to."""

    def __init__(self, count: int, arguments: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.ends = []
        for rank in range(count):
            own, other = context.Pipe()
            context.Process(target=_serve, args=(other, Worker(rank, count), arguments), daemon=True).start()
            self.ends.append(own)
        for end in self.ends:
            end.recv()

    def __call__(self) -> list[str]:
        """All answers."""
        texts = dict[int, str]()
        for end in self.ends:
            end.send(None)
        for end in self.ends:
            texts |= end.recv()
        return [texts[index] for index in range(len(texts))]


def _serve(end: Any, worker: Worker, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    vlm = load_vlm(arguments.model)
    end.send(None)
    while True:
        end.recv()
        questions = questions_of(arguments)
        batches = Answering(vlm, questions, RunSettings(batch_tokens=arguments.batch_tokens))(
            share_of(questions.questions, worker)
        )
        end.send({answered.index: answered.text for batch in batches for answered in batch})


def with_threads(count: int, way: Callable[[], list[str]]) -> Callable[[], list[str]]:
    """The same with so many threads of torch."""

    def asked() -> list[str]:
        torch.set_num_threads(count)
        return way()

    return asked


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
    vlm, processors = load_vlm(arguments.model), os.cpu_count() or 1
    processes = Processes(processors, arguments)
    alone = "one question at a time"
    ways: dict[str, Callable[[], list[str]]] = {
        alone: with_threads(1, lambda: one_at_a_time(vlm, arguments)),
        f"{alone}, {processors} threads": with_threads(processors, lambda: one_at_a_time(vlm, arguments)),
        "evaluate": with_threads(1, lambda: by_evaluate(arguments)),
        "benchmark runner": with_threads(1, lambda: by_runner(vlm, arguments)),
        f"benchmark runner, {processors} processes": processes,
    }
    texts, rates = dict[str, list[str]](), dict[str, list[float]]()
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            texts[name] = way()
            rates.setdefault(name, []).append(len(texts[name]) / (time.perf_counter() - started))
    bases = [sorted(found)[arguments.rounds // 2] for name, found in rates.items() if name.startswith(alone)]
    print("| | questions | questions/s, each round | of one at a time | of the faster of both |\n|---|---|---|---|---|")
    for name, found in rates.items():
        median = sorted(found)[arguments.rounds // 2]
        each = ", ".join(f"{rate:,.1f}" for rate in found)
        print(f"| {name} | {len(texts[name]):,} | {each} | {median / bases[0]:.1f} | {median / max(bases):.1f} |")
    asked = len(texts[alone])
    same = all(found[:asked] == texts[alone] for found in texts.values())
    print(f"the first {asked} answers are {'the same' if same else 'NOT the same'}")


if __name__ == "__main__":
    main()
