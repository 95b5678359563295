"""Spans: the same characters under every template and tokenizer, each exactly once and in order."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny_models import GOLDEN

from alignkd.inputs.prompts import PromptError
from alignkd.inputs.spans import counted
from alignkd.models.encoders.llama_tokenizer import LlamaSentencePieceTokenizer
from alignkd.models.encoders.piece_offsets import Piece, piece_offsets
from alignkd.models.encoders.placeholder import LoadedImage, PlaceholderEncoder
from alignkd.models.encoders.text_offsets import text_offsets
from alignkd.models.loading import load_vlm

sys.path.append(str(Path(__file__).parents[1] / "families"))  # the builders of other families' checkpoints
import make_llava
import make_qwen2_5_vl
from PIL import Image
from tiny_tokenizers import sentencepiece


class SquareMode:
    """What the encoder asks of image preprocessing here."""

    square_mode = "pad"


def placeholder(tokenizer, template="v1"):
    return PlaceholderEncoder(tokenizer, SquareMode(), template, 2**20, 4)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Every encoder by name."""
    folder = tmp_path_factory.mktemp("models")
    make_llava.write(folder / "llava")
    make_qwen2_5_vl.write(folder / "qwen")
    shutil.copytree(GOLDEN / "student", folder / "golden")
    legacy, now = (LlamaSentencePieceTokenizer.from_pretrained(folder / "golden", legacy=legacy) for legacy in (True, False))
    return {
        "v1": placeholder(legacy),
        "v1, not legacy": placeholder(now),
        "plain": placeholder(legacy, "plain"),
        "v1, fast": placeholder(sentencepiece(["<image>"])),
        "llava": load_vlm(folder / "llava").encoder("chat", 2**20),
        "qwen": load_vlm(folder / "qwen").encoder("chat", 2**20),
    }


ONE_ROUND = ("plain", "v1, not legacy")
"""Those that take no more turns: the template, or the reference's own count, which masks every answer."""
ENCODERS = ("v1", "v1, not legacy", "plain", "v1, fast", "llava", "qwen")


def encode(encoder, turns):
    """The input; its images are all alike."""
    images = sum(said.count("<image>") for _, said in turns)
    size = (40, 30)
    loaded = Image.new("RGB", size) if encoder.needs_sizes else LoadedImage(torch.zeros(3, 8, 8), size)
    planned = encoder.plan(turns, images, [size] * images)
    return encoder.finish(turns, planned, [loaded] * images)[0]


def own_text(turns):
    """The counted characters of a conversation."""
    joined = "".join(said.replace("<image>", "") for _, said in turns)
    return "".join(c for c in joined if not c.isspace() and c != "\u2581")


def check_cover(spans, first, last):
    """From ``first`` to ``last`` each character once, in order; bytes of one character share it."""
    place, before = first, (first, first)
    for start, end in spans.tolist():
        assert start <= end
        if start < end and (start, end) != before:
            assert start == place
            place = end
        elif start == end:
            assert start == place
        else:
            assert end - start == 1
        before = (start, end) if start < end else before
    assert place == last


said = st.text(
    st.sampled_from("ab cd.?\n\té日本😀👍🏽\u0301\u2581\u3000ß<>0x") | st.characters(exclude_categories=["Cs", "Cn", "Co"]),
    max_size=12,
)


@st.composite
def conversations(draw, turns):
    found = []
    for number in range(turns):
        text = draw(said)
        for _ in range(draw(st.integers(0, 2)) if number % 2 == 0 and turns < 5 else 0):
            place = draw(st.integers(0, len(text)))
            text = f"{text[:place]}<image>{text[place:]}"
        found.append((("human", "gpt")[number % 2], text))
    return found


EXAMPLES = [
    [("human", "<image>\nWhat  is it?"), ("gpt", "A cat.\n\nIt sits."), ("human", "and\tthis <image>?"), ("gpt", "é😀 日本")],
    [("human", "What <image> <image> is it?"), ("gpt", " 👍🏽 yes \u2581 ")],
    [("human", "no image\n"), ("gpt", "</s <0x0A> a")],
]


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=60)
@given(turns=st.sampled_from([2, 4, 6]).flatmap(conversations))
@example(turns=EXAMPLES[0])
@example(turns=EXAMPLES[1])
@example(turns=EXAMPLES[2])
def test_spans_cover_the_conversation_exactly_once_and_in_order(encoders, name, turns):
    encoder, turns = encoders[name], turns[:2] if name in ONE_ROUND else turns
    assume(all(said.replace("<image>", "").strip() for _, said in turns))
    try:
        given_input = encode(encoder, turns)
    except PromptError:
        assume(False)
    text, ids = own_text(turns), given_input.input_ids
    assert given_input.spans.shape == (len(ids), 2)
    assert given_input.spans.dtype == np.int32
    first = len(own_text(turns[:1])) if name == "plain" else 0
    check_cover(given_input.spans, first, len(text))
    if name.startswith("v1") or name == "plain":
        for token, (start, end) in zip(ids.tolist(), given_input.spans.tolist(), strict=True):
            piece = encoder.tokenizer.convert_ids_to_tokens(token) if token >= 0 else ""
            assert text[start:end] in piece.replace("\u2581", "") or piece.startswith("<0x") or piece == "<unk>"


@pytest.mark.parametrize("turns", EXAMPLES[:2])
def test_answers_lie_at_the_same_characters_for_every_encoder(encoders, turns):
    expected = None
    for name in ENCODERS:
        if len(turns) > 2 and name in ONE_ROUND:
            continue
        found = encode(encoders[name], turns)
        supervised = found.spans[found.labels >= 0]
        covered = {place for start, end in supervised.tolist() for place in range(start, end)}
        expected = covered if expected is None else expected
        assert covered == expected, name
    texts = [len(own_text([turn])) for turn in turns]
    ends = np.cumsum(texts)
    assert expected == {i for turn in range(1, len(turns), 2) for i in range(ends[turn - 1], ends[turn])}


def test_a_first_turn_that_the_template_leaves_out_is_counted(encoders):
    turns = [("gpt", "Hi, you."), ("human", "What is it?"), ("gpt", "A cat.")]
    found = encode(encoders["v1"], turns)
    check_cover(found.spans, len("Hi,you."), len("Hi,you.Whatisit?Acat."))


def test_cut_ids_have_cut_spans(encoders):
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "A cat. " * 20)]
    whole = encode(encoders["v1"], turns)
    short = PlaceholderEncoder(encoders["v1"].tokenizer, SquareMode(), "v1", len(whole.input_ids) - 30, 4)
    found = encode(short, turns)
    assert len(found.input_ids) == len(whole.input_ids) - 30
    np.testing.assert_array_equal(found.spans, whole.spans[:-30])


@pytest.mark.parametrize("name", ["v1", "llava"])
def test_where_nobody_asks_for_spans_the_input_is_otherwise_the_same(encoders, name):
    encoder = copy.copy(encoders[name])
    whole, encoder.with_spans = encode(encoder, EXAMPLES[1]), False
    found = encode(encoder, EXAMPLES[1])
    np.testing.assert_array_equal(found.input_ids, whole.input_ids)
    np.testing.assert_array_equal(found.labels, whole.labels)
    assert len(whole.spans) == len(whole.input_ids)
    assert name != "v1" or len(found.spans) == 0


def test_a_tokenizer_that_cannot_tell_gives_no_spans():
    class Slow:
        bos_token_id = 1
        is_fast = False

    assert text_offsets(Slow(), "text") is None


def test_unknown_characters_belong_to_the_unknown_piece():
    pieces = [Piece("\u2581a"), Piece("<unk>", "unknown"), Piece("b")]
    found = piece_offsets(pieces, "a é日b", lambda character: character in "ab ")
    assert found.tolist() == [[0, 1], [2, 4], [4, 5]]


def test_pieces_that_do_not_make_up_the_text_are_no_offsets():
    with pytest.raises(ValueError, match=r"gives 'b' where the text continues with 'ac'"):
        piece_offsets([Piece("b")], "ac", lambda _: True)
    with pytest.raises(ValueError, match="<0xC3>"):
        piece_offsets([Piece("<0xC3>", "byte")], "ac", lambda _: True)


def test_image_tags_and_white_space_do_not_count():
    assert counted("a <image>\u2581b\n").tolist() == [True] + [False] * 9 + [True, False]
