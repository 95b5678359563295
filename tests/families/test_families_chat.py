"""Every family holds a conversation: streamed answers are those that are not, and prompts are those of ``evaluate``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES
from conversations import ONE
from family_conformance import same_input
from PIL import Image

from alignkd.errors import SampleError
from alignkd.models.loading import load_vlm
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.sample import read_sample
from alignkd.pipeline.evaluate.chat.conversation import Conversation
from alignkd.pipeline.evaluate.chat.stream import AnswerStreamer
from alignkd.pipeline.evaluate.decoding import Decoding, generate_ids
from alignkd.pipeline.evaluate.harness.answering import Asked, answers, harness_encoder
from alignkd.pipeline.evaluate.running.generation import answer

QUESTION, NEXT = "What colour is the cat?", "And the mat?"


@pytest.fixture(scope="module", params=list(FAMILIES))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def vlm(name, written):
    return load_vlm(written(name))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    ONE.images[0].save(path)
    return str(path)


def conversation(vlm, picture, tokens=24, **settings):
    decoding = Decoding(tokens, **settings)
    return Conversation.about(vlm, [picture], decoding, template=vlm.default_template)


def evaluated(vlm, picture, *texts):
    """What ``evaluate`` makes of a record with these turns."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    sample = read_sample({"id": "a", **({"image": picture} if picture else {}), "conversations": turns})
    return Preparer.of(vlm, template=vlm.default_template, max_length=2048, image_root="/").question(sample)


def test_answers_that_are_streamed_are_those_that_evaluate_generates_of_the_same_turns(name, vlm, picture):
    talk, pieces = conversation(vlm, picture), []
    _, given, _ = talk.prompt(QUESTION)
    asked = evaluated(vlm, picture, f"<image>\n{QUESTION}", "unknown")
    if vlm.caches_tower:  # features of the tower, in place of pixel values
        assert given.input_ids.tolist() == asked.input_ids.tolist()
    else:
        assert same_input(given, asked)
    first = talk.ask(QUESTION, pieces.append)
    assert "".join(pieces) == first.answer == answer(vlm, [asked], 24)[0]
    if not FAMILIES[name].several_turns:
        with pytest.raises(SampleError, match="/new begins another conversation"):
            talk.ask(NEXT, pieces.append)
        talk.begin_anew()
        assert talk.ask(QUESTION, pieces.append).answer == first.answer
        return
    talk.turns = [("human", f"<image>\n{QUESTION}"), ("gpt", "It is blue.")]  # what random weights say may be no text
    asked = evaluated(vlm, picture, f"<image>\n{QUESTION}", "It is blue.", NEXT, "unknown")
    pieces.clear()
    second = talk.ask(NEXT, pieces.append)
    assert "".join(pieces) == second.answer == answer(vlm, [asked], 24)[0]
    assert talk.turns[2:] == [("human", NEXT), ("gpt", second.answer)]


def test_pieces_of_any_ids_are_whole_words_and_together_the_text(vlm):
    rng = np.random.default_rng(0)
    size = len(vlm.tokenizer)
    words = vlm.tokenizer("a dog \u00e9\u00e8 \U0001f600  caf\u00e9\n\n \u65e5\u672c and ## red ###").input_ids
    for ids in [words, *(rng.integers(0, size, 40).tolist() for _ in range(30))]:
        pieces = []
        streamer = AnswerStreamer(vlm.answer_text, pieces.append)
        streamer.put(torch.tensor([[1, 2, 3]]))
        for one in ids:
            streamer.put(torch.tensor([one]))
        streamer.end()
        assert "".join(pieces) == vlm.answer_text(ids)


def test_questions_of_other_programs_are_answered_in_batches_as_evaluate_answers_each_alone(name, vlm, picture):
    texts = [QUESTION, "Why?", "What is on the mat in the middle of it?"]
    shown = [lambda: [Image.open(picture)]] * 2 + [list if FAMILIES[name].without_image else lambda: [Image.open(picture)]]
    asked = [Asked(text, pictures, Decoding(6)) for text, pictures in zip(texts, shown, strict=True)]
    found = dict(answers(vlm, harness_encoder(vlm, None, None), asked, 3))
    for index, (text, pictures) in enumerate(zip(texts, shown, strict=True)):
        reference = picture if pictures() else None
        alone = evaluated(vlm, reference, f"<image>\n{text}" if reference else text, "unknown")
        assert found[index] == answer(vlm, [alone], 6)[0]


def test_sampled_answers_follow_the_seed(vlm, picture):
    talk, answers = conversation(vlm, picture, 8, temperature=1.0, top_p=0.9), []
    _, given, _ = talk.prompt(QUESTION)
    for seed in (1, 1, 2, 3, 4):
        torch.manual_seed(seed)
        answers.append(generate_ids(vlm, [given], talk.decoding)[0])
    assert answers[0] == answers[1]
    assert len({tuple(ids) for ids in answers}) > 1
