"""Answers to benchmarks: those of one question at a time, whatever the batches; each picture through the tower once."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import STUDENT

from alignkd.errors import DataError, TransientError
from alignkd.inputs.prompts import tokenize_with_images
from alignkd.models.encoders.images import ImagePreprocessor
from alignkd.models.loading import load_vlm
from alignkd.pipeline.evaluate.benchmarks.contract import About, Benchmark, Question, Reading, Score
from alignkd.pipeline.evaluate.benchmarks.registry import SIX, open_benchmark
from alignkd.pipeline.evaluate.running import answering, batches, schedule
from alignkd.pipeline.evaluate.running.answering import Answering, RunSettings, run_benchmark
from alignkd.pipeline.runtime.ranks import Worker

BENCHMARKS = Path(__file__).parents[1] / "data" / "benchmarks"
HERE = [name for name in SIX if (BENCHMARKS / name).is_dir()]


class Echo(Benchmark):
    """Right is what is not empty."""

    about = About("echo", "Echo", "nowhere", "none", "accuracy, %")

    @classmethod
    def open(cls, folder, protocol="mobilevlm"):
        raise NotImplementedError

    @property
    def max_new_tokens(self):
        return 4

    def match(self, answers):
        return list(answers)

    def score(self, answers):
        readings = [Reading(q, a.text, a.text, float(bool(a.text))) for q, a in zip(self.questions, answers, strict=True)]
        return Score(sum(r.score for r in readings), "percent", {}, tuple(readings))


def echo(folder, pictures, questions):
    """``questions`` about ``pictures`` in turn."""
    for number in range(pictures):
        Image.new("RGB", (12, 8), (number % 256, number // 256, 90)).save(folder / f"{number}.png")
    texts = [f"What is it? {'why ' * (i % 5)}" for i in range(questions)]
    return Echo(folder, "mobilevlm", [Question(i, t, t, (f"{i % pictures}.png",)) for i, t in enumerate(texts)])


@pytest.fixture(scope="module")
def vlm():
    return load_vlm(STUDENT)


@pytest.fixture
def encoded(monkeypatch):
    """Number of images of each call of the tower."""
    from alignkd.models.modules.mobilevlm import MobileVlmModel

    calls, real = [], MobileVlmModel.run_tower
    monkeypatch.setattr(MobileVlmModel, "run_tower", lambda self, pixels: calls.append(len(pixels)) or real(self, pixels))
    return calls


def opened(name, monkeypatch, new_tokens=6):
    """A golden benchmark whose answers may be short, as those of random weights do not end."""
    benchmark = open_benchmark(name, BENCHMARKS)
    monkeypatch.setattr(type(benchmark), "max_new_tokens", property(lambda _: new_tokens))
    missing = set(benchmark.missing_images())
    return benchmark.only([i for u in benchmark.units() for i in u if not missing & set(benchmark.questions[u[0]].images)])


def texts_of(vlm, benchmark, indices=None, **settings):
    chosen = range(len(benchmark.questions)) if indices is None else indices
    found = {a.index: a.text for batch in Answering(vlm, benchmark, RunSettings(**settings))(chosen) for a in batch}
    assert sorted(found) == sorted(chosen)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_batched_answers_are_those_of_one_question_at_a_time(vlm, monkeypatch, name):
    benchmark = opened(name, monkeypatch)
    alone = texts_of(vlm, benchmark, batch_tokens=1)
    assert texts_of(vlm, benchmark) == alone
    assert texts_of(vlm, benchmark, batch_tokens=700) == alone
    assert len(set(alone.values())) > 1


@pytest.mark.parametrize("name", HERE)
def test_prompts_and_pictures_are_those_of_mobilevlms_loader(vlm, monkeypatch, name):
    benchmark = opened(name, monkeypatch)
    asked, recorded = Answering(vlm, benchmark, RunSettings()), {}
    for line in map(json.loads, (BENCHMARKS / name / "prompts.jsonl").read_text().splitlines()):
        key = str(line["question_id"]), tuple(tokenize_with_images(line["prompt"], vlm.tokenizer))
        recorded[key] = line.get("image_given_to_processor")
    differ = 0
    for index, question in enumerate(benchmark.questions):
        ids = asked.question(index, [asked.pictures.load(image) for image in question.images]).input_ids
        key = str(question.question_id), tuple(ids.tolist())
        if key not in recorded:
            differ += any(key[0] == question_id for question_id, _ in recorded)
            continue
        data = [benchmark.read_image(image) for image in question.images]
        given = [asked.encoder.images.squared(Image.open(io.BytesIO(picture))) for picture in data]
        expected = [recorded[key]] if recorded[key] else []
        assert [{"mode": picture.mode, "size": list(picture.size)} for picture in given] == expected
    # Of MMBench, the reference loses option texts such as "none" when it reads the file.
    assert differ <= {"mmbench": 8}.get(name, 0)


def test_an_image_that_is_padded_in_its_own_mode_keeps_it(vlm):
    settings = vlm.images.settings
    pad, own = (ImagePreprocessor(settings, aspect) for aspect in ("pad", "pad-own-mode"))
    picture = Image.new("RGBA", (6, 10), (200, 10, 10, 255))
    assert (pad.squared(picture).mode, own.squared(picture).mode) == ("RGB", "RGBA")
    assert own.squared(picture).getpixel((0, 0)) == (122, 116, 104, 255)
    grey = Image.new("L", (6, 10), 7)
    assert own.squared(grey).mode == "RGB"
    assert torch.equal(own(grey), pad(grey))


@pytest.mark.parametrize(("pictures", "questions"), [(40, 200), pytest.param(398, 12_578, marks=pytest.mark.slow)])
def test_each_picture_goes_through_the_tower_once_a_run_in_one_process_and_in_two(
    vlm, tmp_path, monkeypatch, encoded, pictures, questions
):
    benchmark = echo(tmp_path, pictures, questions)
    monkeypatch.setattr(batches, "halving", lambda _ask, questions: ["a"] * len(questions))
    monkeypatch.setattr(batches, "share_prompts", lambda *_: None)
    assert len(texts_of(vlm, benchmark)) == questions
    assert sum(encoded) == pictures
    shares = [schedule.share_of(benchmark.questions, Worker(rank, 2)) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(questions))
    assert abs(len(shares[0]) - len(shares[1])) <= questions // pictures + 1
    encoded.clear()
    for share in shares:
        texts_of(vlm, benchmark, share)
    assert sum(encoded) == pictures


def test_features_of_one_window_alone_are_kept(vlm, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "WINDOW", (1024, 3))
    benchmark, held = echo(tmp_path, 10, 20), []
    real = answering.Pictures.ready
    monkeypatch.setattr(answering.Pictures, "ready", lambda self, asked: held.append(len(asked)) or real(self, asked))
    texts_of(vlm, benchmark)
    assert held == [3, 3, 3, 1]


def test_a_live_model_and_random_numbers_are_left_as_they_were(vlm, tmp_path):
    live = load_vlm(STUDENT)
    live.model.train()
    live.tower.eval()
    before, modes = torch.get_rng_state(), [module.training for module in live.model.modules()]
    score = run_benchmark(live, echo(tmp_path, 2, 5))
    assert [module.training for module in live.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    expected = texts_of(vlm, echo(tmp_path, 2, 5))
    assert [r.prediction for r in score.readings] == [expected[index] for index in range(5)]
    batch = live.collate([live.encoder("v1", 999).encode([("human", "a"), ("gpt", "b")], [])[0]])
    live.decode(batch, None).sum().backward()  # nothing that was made during generation stands in the way


def test_a_damaged_picture_is_named_and_nothing_is_left_out(vlm, tmp_path):
    benchmark = echo(tmp_path, 2, 4)
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"picture 1\.png of Echo .*not a readable image.*no question may be left out"):
        run_benchmark(vlm, benchmark)


@pytest.mark.parametrize("pictures", [2, 7])
def test_a_batch_for_which_memory_does_not_suffice_is_halved(vlm, tmp_path, monkeypatch, pictures):
    name = "answer_after" if pictures == 2 else "answer"
    benchmark, sizes, real = echo(tmp_path, pictures, 7), [], getattr(batches, name)
    expected = texts_of(vlm, benchmark)

    def call(*given, **others):
        questions = given[2] if name == "answer_after" else given[1]
        sizes.append(len(questions))
        if len(questions) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*given, **others)

    monkeypatch.setattr(batches, name, call)
    assert texts_of(vlm, benchmark) == expected
    assert sizes == [7, 3, 1, 2, 4, 2, 2]

    def never(*_, **__):
        raise MemoryError

    monkeypatch.setattr(batches, name, never)
    with pytest.raises(TransientError, match="memory ran out"):
        run_benchmark(vlm, benchmark)


def test_what_questions_about_a_picture_begin_with_is_computed_once(vlm, tmp_path, monkeypatch):
    benchmark, shared, real = echo(tmp_path, 5, 60), [], batches.share_prompts
    monkeypatch.setattr(batches, "share_prompts", lambda vlm, some: shared.append(sorted(some)) or real(vlm, some))
    alone = {}
    for index in range(60):  # a picture with one question is asked about whole
        alone |= texts_of(vlm, benchmark, [index])
    assert shared == []
    assert texts_of(vlm, benchmark) == alone
    assert list(map(len, shared)) == [5]
    shared.clear()
    assert texts_of(vlm, benchmark, batch_tokens=1000) == alone
    names = [name for some in shared for name in some]
    assert len(names) == len(set(names)) == 5  # each picture once
    assert all(len(some) == 2 for some in shared[:-1])


@given(st.lists(st.integers(1, 500), max_size=60), st.integers(1, 4000), st.integers(1, 2000))
def test_batches_hold_every_question_once_and_keep_to_the_budget(lengths, budget, new_tokens):
    batches = schedule.like_length_batches(lengths, new_tokens, budget)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    room = min(new_tokens, schedule.ANSWER_TOKENS)
    assert all(len(b) == 1 or len(b) * (max(lengths[p] for p in b) + room) <= budget for b in batches)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=80), st.integers(1, 5))
def test_shares_hold_every_question_once_and_no_picture_is_in_two(pictures, processes):
    questions = [Question(i, "", "", (str(p),) if p else ()) for i, p in enumerate(pictures)]
    shares = [schedule.share_of(questions, Worker(rank, processes)) for rank in range(processes)]
    assert sorted(index for share in shares for index in share) == list(range(len(questions)))
    seen = [{pictures[index] for index in share} - {0} for share in shares]
    assert sum(map(len, seen)) == len(set(pictures) - {0})
