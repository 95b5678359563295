"""A conversation about a picture, in this process: turns, lengths, what is refused, and the pieces of an answer."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import GOLDEN_SAMPLES, IMAGES, STUDENT

from alignkd.errors import ConfigError, DataError, SampleError
from alignkd.models.loading import load_vlm
from alignkd.pipeline.config.chat import ChatConfig
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.sample import read_sample
from alignkd.pipeline.evaluate.chat.conversation import Conversation, check_pictures
from alignkd.pipeline.evaluate.chat.questions import LONGEST, checked, piped
from alignkd.pipeline.evaluate.chat.stream import AnswerStreamer, settled
from alignkd.pipeline.evaluate.decoding import Decoding

PICTURE = str(IMAGES / "0.png")


def nothing(_):
    """Where pieces go that no test looks at."""


@pytest.fixture(scope="module")
def vlm():
    return load_vlm(STUDENT)


def talk(vlm, *pictures, tokens=6, **more):
    return Conversation.about(vlm, pictures, Decoding(tokens), template="v1", **more)


def test_the_tower_runs_once_for_a_picture_whatever_is_asked(vlm, monkeypatch):
    from alignkd.models.modules.mobilevlm import MobileVlmModel

    calls, real = [], MobileVlmModel.run_tower
    monkeypatch.setattr(MobileVlmModel, "run_tower", lambda self, pixels: calls.append(len(pixels)) or real(self, pixels))
    conversation = talk(vlm, PICTURE, str(IMAGES / "1.png"), PICTURE)
    for question in ("Which?", "Why?", "And then?"):
        conversation.ask(question, nothing)
    assert calls == [2]
    assert [text.count("<image>") for _, text in conversation.turns] == [3, 0, 0, 0, 0, 0]


def test_the_prompt_is_what_show_puts_before_the_answer(vlm):
    record = GOLDEN_SAMPLES[0]
    preparer = Preparer.of(vlm, template="v1", max_length=2048, image_root=IMAGES)
    shown = preparer(read_sample(record)).input
    question = record["conversations"][0]["value"].replace("<image>", "").strip()
    _, asked, _ = talk(vlm, str(IMAGES / record["image"])).prompt(question)
    length = len(asked.input_ids)
    assert asked.input_ids.tolist() == shown.input_ids[:length].tolist()
    assert (shown.labels[:length] == -100).all()
    assert shown.labels[length + 1] != -100
    before = vlm.run_tower(preparer(read_sample(record)).input.images)
    torch.testing.assert_close(asked.images, before, atol=1e-5, rtol=1e-4)


def test_a_system_turn_stands_before_every_question_and_survives_a_new_conversation(vlm):
    conversation = talk(vlm, system="Answer in one word.")
    for _ in range(2):
        asked = ["Which?", "Why?"]
        for number, question in enumerate(asked):
            turns, given, _ = conversation.prompt(question)
            whole = vlm.encoder("v1", 2048).question([("system", "Answer in one word."), *turns, ("gpt", "")], [])
            assert given.input_ids.tolist() == whole.input_ids.tolist()
            assert len(turns) == 2 * number + 1
            conversation.ask(question, nothing)
        conversation.begin_anew()
    _, without, _ = talk(vlm).prompt("Which?")
    assert without.input_ids.tolist() != talk(vlm, system="Answer in one word.").prompt("Which?")[1].input_ids.tolist()


def test_a_conversation_without_a_picture_is_text_alone(vlm):
    conversation = talk(vlm)
    _, asked, _ = conversation.prompt("What is an <image>?")
    assert (asked.input_ids >= 0).all()
    assert conversation.ask("What is two and two?", nothing).tokens > 0


def test_a_conversation_that_outgrows_the_length_says_how_to_go_on_and_stays_as_it_was(vlm):
    _, asked, _ = talk(vlm, PICTURE).prompt("Why?")
    most = len(vlm.collator.expand(asked).input_ids) + 20
    conversation = talk(vlm, PICTURE, max_length=most)
    conversation.ask("Why?", nothing)
    turns = list(conversation.turns)
    with pytest.raises(SampleError, match=rf"takes \d+ positions.* {most} are the most.*/new begins another conversation"):
        conversation.ask("And a very long question indeed, " * 4, nothing)
    assert conversation.turns == turns
    conversation.begin_anew()
    assert conversation.ask("Why?", nothing).answer == turns[1][1]


def test_an_answer_has_no_more_tokens_than_there_is_room_for(vlm):
    whole = talk(vlm, PICTURE, tokens=30)
    _, asked, room = whole.prompt("Why?")
    positions = len(vlm.collator.expand(asked).input_ids)
    assert room == whole.limit - positions == 2048 - positions
    cut = talk(vlm, PICTURE, tokens=30, max_length=positions + 3).ask("Why?", nothing)
    assert (cut.tokens, cut.cut) == (3, True)


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_was_written(vlm):
    conversation, pieces = talk(vlm, PICTURE, tokens=30), []

    class Stop(AnswerStreamer):
        def put(self, value):
            super().put(value)
            if len(self.ids) == 5:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alignkd.pipeline.evaluate.chat.conversation.AnswerStreamer", Stop)
        stopped = conversation.ask("Why?", pieces.append, may_stop=True)
        with pytest.raises(KeyboardInterrupt):
            conversation.ask("Why?", pieces.append)
    assert (stopped.stopped, stopped.tokens) == (True, 5)
    assert conversation.turns == [("human", "<image>\nWhy?"), ("gpt", stopped.answer)]
    assert talk(vlm, PICTURE, tokens=5).ask("Why?", nothing).answer == stopped.answer


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "is empty"),
        (" \t", "is empty"),
        ("caf\udce9", "not UTF-8, from its character 4"),
        ("an <image> and an <image>?", "names 2 pictures with <image>, and --image gives 1: leave <image> out"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_and_the_conversation_goes_on(vlm, question, message):
    conversation = talk(vlm, PICTURE)
    with pytest.raises(SampleError, match=message):
        conversation.ask(question, nothing)
    assert conversation.turns == []
    assert conversation.ask("What is <image> it?", nothing).tokens


def test_pictures_that_are_none_are_refused_by_name(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for name, error, message in (
        ("none.png", SampleError, "none.png: No such file"),
        ("", ConfigError, "is a folder"),
        ("text.png", SampleError, "text.png: not a readable image"),
    ):
        with pytest.raises(error, match=message):
            check_pictures([PICTURE, str(tmp_path / name)])


def test_settings_that_make_no_conversation_are_refused(vlm):
    with pytest.raises(ConfigError, match="--template plain shows the model the picture alone"):
        ChatConfig(model="m", template="plain")
    with pytest.raises(ConfigError, match="--top-p is 0"):
        ChatConfig(model="m", top_p=0.0)
    with pytest.raises(ConfigError, match="known are v1, plain"):
        Conversation.about(vlm, [], Decoding(1), template="chat")
    with pytest.raises(SampleError, match="is empty"):
        checked(["fine", " "])


def test_questions_of_a_pipe_are_its_lines():
    assert list(piped(io.StringIO("one\r\ntwo \n\nthree"))) == ["one", "two ", "", "three"]
    with pytest.raises(DataError, match="holds no question"):
        list(piped(io.StringIO()))
    with pytest.raises(DataError, match=r"line 2 of standard input has more than 1,000,000 characters"):
        list(piped(io.StringIO("a\n" + "b" * (LONGEST + 1))))
    assert len(list(piped(io.StringIO("b" * LONGEST + "\na")))) == 2


WORDS = st.text(st.sampled_from("ab \n\t\u65e5\u672c\U0001f600\u00e9.") | st.characters(exclude_categories=["Cs"]), max_size=30)


@given(WORDS)
def test_pieces_of_bytes_as_they_come_are_together_the_text(text):
    """Ids are bytes of UTF-8: the hardest tokenizer, whose letters come in several parts."""
    pieces = []
    streamer = AnswerStreamer(lambda ids: bytes(ids).decode(errors="replace").strip(), pieces.append)
    streamer.put(torch.zeros(1, 4, dtype=torch.long))
    for byte in text.encode():
        streamer.put(torch.tensor([byte]))
        assert text.strip().startswith("".join(pieces))
    streamer.end()
    streamer.end()
    assert "".join(pieces) == text.strip()


@given(WORDS, WORDS)
def test_what_is_settled_stays_whatever_follows(text, more):
    assert (text + more).strip().startswith(text.strip()[: settled(text.strip())])


@pytest.mark.parametrize(
    ("text", "shown"),
    [("one two", "one"), ("one", ""), ("one ", "one"), ("\u65e5\u672c\ufffd\ufffd", "\u65e5\u672c"), ("a\n b", "a"), ("", "")],
)
def test_a_word_is_shown_when_the_next_one_begins(text, shown):
    assert text[: settled(text)] == shown


def test_a_decoder_that_changes_what_it_wrote_gives_the_whole_answer_once_more():
    pieces, texts = [], iter(["a b", "a b", "x"] + ["x y"] * 9)
    streamer = AnswerStreamer(lambda _: next(texts), pieces.append)
    for value in np.arange(3):
        streamer.put(torch.tensor([int(value)]))
    streamer.end()
    assert "".join(pieces) == "a\nx y"
