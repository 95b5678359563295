from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from PIL import Image

from alignkd.errors import ConfigError
from alignkd.models.checkpoints.tokenizer_files import load_tokenizer
from alignkd.models.loading import load_vlm
from alignkd.models.vlm import module_fingerprint
from alignkd.pipeline.config.demo import LanguageModelSize, TowerTraining
from alignkd.pipeline.data.easy_vqa import (
    COLOURS,
    SHAPES,
    EasyVqa,
    concept_labels,
    few_labelled,
    load_easy_vqa,
    question_only_floor,
    statistics,
    write_llava,
)
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.demo import DemoConfig, demo
from alignkd.pipeline.demo import run as run_module
from alignkd.pipeline.demo.checkpoints import new_checkpoint, train_tokenizer
from alignkd.pipeline.demo.tower import train_tower
from alignkd.pipeline.runtime.out_folder.lock import held

SMALL = TowerTraining(hidden_size=16, layers=2, heads=2, intermediate_size=16, epochs=1, batch_size=16)
TINY = LanguageModelSize(hidden_size=16, layers=1, heads=2, intermediate_size=16)


@pytest.fixture(scope="module")
def easy():
    return load_easy_vqa()


@pytest.fixture(scope="module")
def few(easy):
    """A few images of each split, so that reading and training take no time."""
    train, test = ({q.image for q in split[:count]} for split, count in ((easy.train, 320), (easy.test, 160)))
    return EasyVqa(
        easy.root, [q for q in easy.train if q.image in train][:400], [q for q in easy.test if q.image in test][:160]
    )


@pytest.fixture(scope="module")
def tokenizer_folder(easy, tmp_path_factory):
    return train_tokenizer(easy.train, tmp_path_factory.mktemp("tokenizer"))


def test_the_counts_are_those_of_the_package(easy):
    assert statistics(easy) == {
        "train_questions": 38_575,
        "test_questions": 9_673,
        "train_images": 4_000,
        "test_images": 1_000,
        "answers": 13,
    }


def test_without_the_image_two_thirds_can_be_guessed(easy):
    assert question_only_floor(easy.train, easy.test) == pytest.approx(0.670, abs=5e-4)


def test_every_question_has_its_image_in_the_installed_package(easy):
    assert all((easy.root / image).is_file() for image in {q.image for q in [*easy.train, *easy.test]})
    with Image.open(easy.root / easy.test[0].image) as image:
        assert image.size == (64, 64)
    assert len({q.id for q in [*easy.train, *easy.test]}) == 38_575 + 9_673
    assert not {q.image for q in easy.train} & {q.image for q in easy.test}


def test_the_few_labelled_images_are_a_function_of_the_seed_and_carry_all_their_questions(easy):
    chosen = few_labelled(easy.train, 0.03, 0)
    assert chosen == few_labelled(easy.train, 0.03, 0)
    assert chosen != few_labelled(easy.train, 0.03, 1)
    images = {q.image for q in chosen}
    assert len(images) == 120
    assert chosen == [q for q in easy.train if q.image in images]


def test_what_is_written_is_llavas_format(easy, tmp_path):
    samples = SampleFile(write_llava(easy.test[:50], tmp_path / "d.json"))
    assert [samples[i].id for i in range(50)] == [q.id for q in easy.test[:50]]
    assert samples[3].turns == (("human", f"<image>\n{easy.test[3].text}"), ("gpt", easy.test[3].answer))


def test_concepts_are_what_the_answers_say(easy):
    labels = concept_labels(easy.test)
    truth = Counter()
    for q in easy.test:
        colour, shape = labels.get(q.image, (-1, -1))
        if q.text.startswith("is there a ") and q.answer == "yes":
            word = q.text.removeprefix("is there a ").removesuffix("?").split()[0]
            known = (
                COLOURS.index(word) == colour if word in COLOURS else SHAPES.index(word) == shape if word in SHAPES else True
            )
            truth[known or -1 in (colour, shape)] += 1
    assert truth[False] == 0
    assert truth[True] > 50


def test_the_tokenizer_gives_every_question_and_answer_back(easy, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    for text in {q.text for q in easy.train[:2000]} | {q.answer for q in easy.train[:2000]} | {"café, 42\nlines"}:
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).strip() == text
    assert len(tokenizer) <= 512


def test_a_new_checkpoint_loads_again_with_its_tower_and_shape(few, tokenizer_folder, tmp_path):
    labels = dict(list(concept_labels(few.train).items())[:16])
    tower, accuracy = train_tower(few.root, labels, labels, SMALL, "cpu")
    assert set(accuracy) == {"colour", "shape"}
    vlm = load_vlm(new_checkpoint(tokenizer_folder, tower, TINY, tmp_path / "new"))
    assert (vlm.vision_tokens_per_image, vlm.hidden_size, vlm.heads, vlm.default_template) == (16, 16, 2, "v1")
    assert module_fingerprint(vlm.tower) == module_fingerprint(tower)
    assert vlm.vocabulary == len(load_tokenizer(tokenizer_folder))


def test_a_folder_in_use_by_another_run_is_refused(tmp_path):
    with held(tmp_path), pytest.raises(ConfigError, match="is in use by another run"):
        demo(DemoConfig(out=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("shard_format", ["zarr", "webdataset"])
def test_the_whole_demo_ends_with_one_self_contained_report(shard_format, few, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "load_easy_vqa", lambda: few)
    config = DemoConfig(
        out=str(tmp_path / "demo"),
        device="cpu",
        labelled_share=0.3,
        tower=SMALL,
        teacher=LanguageModelSize(32, 2, 2, 32),
        student=TINY,
        teacher_steps=2,
        student_steps=2,
        batch_size=8,
        shard_format=shard_format,
    )
    result = demo(config)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert not re.findall(r"https?://|<script|<link|src=['\"](?!data:)", page)
    assert page.count("data:image/png;base64,") > 30  # charts, and the panels of five samples
    for words in ("Accuracy", "Loss, term by term", "Where the text looks", "The cache", "Time and memory", "Seed 0"):
        assert words in page
    assert set(result.figures["accuracy"]) == {"teacher", "student sft", "student align-kd"}
    assert all(entry["answered"] == len(few.test) for entry in result.figures["accuracy"].values())
    saved = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert saved["accuracy"] == result.figures["accuracy"]
    assert "question-only floor" in result.text
    assert str(tmp_path / "demo" / "report.html") in result.text
    with pytest.raises(ValueError, match="already holds a demo"):
        demo(config)
