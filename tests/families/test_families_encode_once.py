"""Preparing a sample renders and tokenises its text once, and opens each of its image files once."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
from checkpoints import FAMILIES
from conversations import suiting
from family_conformance import LENGTH, same_input

from alignkd.models.loading import load_vlm
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.sample import parse_sample

_OPENED: list[str] | None = None


def _audit(event, arguments):
    if _OPENED is not None and event == "open":
        _OPENED.append(str(arguments[0]))


sys.addaudithook(_audit)


@pytest.fixture
def opened(monkeypatch):
    """Every file that is opened, as its path is given."""
    monkeypatch.setattr(sys.modules[__name__], "_OPENED", [])
    return _OPENED


def count_calls(monkeypatch, calls, owner, name, key):
    """Count the calls of a method of one object."""
    original = getattr(type(owner), name)

    def counted(self, *args, **kwargs):
        calls[key] += self is owner
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(owner), name, counted)


@pytest.fixture
def sample_of(tmp_path):
    """A conversation as a sample, its images written as files."""

    def write(conversation):
        names = []
        for number, image in enumerate(conversation.images):
            image.save(tmp_path / f"{number}.png")
            names.append(f"{number}.png")
        turns = [{"from": speaker, "value": text} for speaker, text in conversation.turns]
        return parse_sample({"id": "a", "image": names, "conversations": turns}, "")

    return write


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm", "paligemma"])
def test_a_chat_sample_is_tokenised_once_and_rendered_once_more_to_find_its_answers_and_each_image_is_opened_once(
    name, written, tmp_path, sample_of, opened, monkeypatch
):
    vlm = load_vlm(written(name))
    preparer = Preparer.of(vlm, template=vlm.default_template, max_length=LENGTH, image_root=tmp_path)
    calls: Counter[str] = Counter()
    count_calls(monkeypatch, calls, vlm.processor, "__call__", "processor")
    if name != "paligemma":
        count_calls(monkeypatch, calls, preparer.encoder._prompts.template, "render", "template")
    count_calls(monkeypatch, calls, vlm.tokenizer, "__call__", "tokenizer")
    for conversation in suiting(FAMILIES[name]):
        sample = sample_of(conversation)
        calls.clear()
        opened.clear()
        preparer(sample)
        templates = {} if name == "paligemma" else {"template": 2}
        assert calls == {"processor": 1, "tokenizer": 1, **templates}, conversation.name
        assert Counter(path.rpartition("/")[2] for path in opened if path.endswith(".png")) == Counter(sample.images)


@pytest.mark.parametrize("name", ["minigpt4", "instructblip", "mobilevlm_v1"])
def test_the_plan_keeps_what_was_tokenised_for_the_second_step(name, written, monkeypatch):
    vlm = load_vlm(written(name))
    encoder = vlm.encoder(vlm.default_template, LENGTH)
    calls: Counter[str] = Counter()
    for conversation in suiting(FAMILIES[name]):
        images = [encoder.load(image) for image in conversation.images]
        planned = encoder.plan(conversation.turns, len(images))
        with monkeypatch.context() as counting:
            count_calls(counting, calls, encoder.tokenizer, "__call__", "tokenizer")
            for method in ("encode_chunk", "chunk_offsets"):  # SentencePiece's, which remember their texts
                if hasattr(encoder.tokenizer, method):
                    counting.setattr(encoder.tokenizer, method, None)
            made = encoder.finish(conversation.turns, planned, images)
        assert calls["tokenizer"] == 0, conversation.name
        assert same_input(made[0], encoder.encode(conversation.turns, images)[0]), conversation.name


def test_a_text_is_tokenised_once_for_its_ids_and_their_spans(written, monkeypatch):
    vlm = load_vlm(written("instructblip"))
    encoder = vlm.encoder("instruction", LENGTH)
    turns = [("human", "<image>\nwhat is it?"), ("gpt", "a dog")]
    images = [encoder.load(suiting(FAMILIES["instructblip"])[0].images[0])]
    encoder.encode(turns, images)  # the start token is asked for once
    calls: Counter[str] = Counter()
    count_calls(monkeypatch, calls, vlm.tokenizer, "__call__", "tokenizer")
    count_calls(monkeypatch, calls, encoder.qformer_tokenizer, "__call__", "qformer")
    encoder.encode(turns, images)
    assert calls == {"tokenizer": 2, "qformer": 1}, "one call a text: question, answer, and the Q-Former's question"


@pytest.mark.parametrize("name", list(FAMILIES))
def test_one_step_gives_the_input_of_two(name, written):
    vlm = load_vlm(written(name))
    encoder = vlm.encoder(vlm.default_template, LENGTH)
    for conversation in suiting(FAMILIES[name]):
        images = [encoder.load(image) for image in conversation.images]
        at_once, truncated = encoder.encode(conversation.turns, images)
        planned = encoder.plan(conversation.turns, len(images), conversation.sizes)
        in_two, also_truncated = encoder.finish(conversation.turns, planned, images)
        assert same_input(at_once, in_two), conversation.name
        assert truncated == also_truncated
