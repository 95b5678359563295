"""Conversations to ids and labels: the reference's rules, restated slowly here, over conversations made by hypothesis."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny_models import GOLDEN, IMAGE

from alignkd.inputs.prompts import IGNORE, TEMPLATES, PromptError, encode_conversation, encode_question, tokenize_with_images
from alignkd.models.checkpoints.tokenizer_files import load_tokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


# --- the reference's rules, one at a time ------------------------------------------------------------------------------


def oracle_ids(text, tokenizer):
    """One start token; each ``<image>`` is one placeholder; every piece of text is tokenised on its own."""
    ids = [tokenizer.bos_token_id]
    pieces = text.split("<image>")
    for number, piece in enumerate(pieces):
        of_piece = tokenizer(piece).input_ids
        assert of_piece[0] == tokenizer.bos_token_id
        ids += of_piece[1:]
        if number < len(pieces) - 1:
            ids.append(IMAGE)
    return ids


def oracle_image_first(turns):
    moved = []
    for who, text in turns:
        images = text.count("<image>")
        if images:
            rest = text.replace("<image>", "").strip()
            text = ("<image>\n" * images + rest).strip()
        moved.append((who, text))
    return moved


def oracle_plain(turns, tokenizer):
    images = "<image>" * sum(text.count("<image>") for _, text in turns)
    answer = turns[1][1].replace("<image>", "")
    ids = oracle_ids(images + answer + "\n", tokenizer)
    prompt = oracle_ids(images, tokenizer)
    return ids, [IGNORE if i < len(prompt) else token for i, token in enumerate(ids)]


def oracle_v1(turns, tokenizer, has_image, max_length):
    if turns[0][0] == "gpt":
        turns = turns[1:]
    text = SYSTEM + " "
    if turns[0][0] == "system":
        text, turns = turns[0][1] + " ", turns[1:]
    for who, said in turns:
        text += "USER:" if who == "human" else "ASSISTANT:"
        if said:
            text += " " + said + (" " if who == "human" else "</s>")
    count = (lambda t: oracle_ids(t, tokenizer)) if has_image else (lambda t: tokenizer(t).input_ids)
    # Without an image the tokenizer cuts the whole text, but no round.
    ids = count(text) if has_image else count(text)[:max_length]
    supervised = [False] * len(ids)
    place = 1
    for part in text.split("</s>"):
        if part == "" or part.count(" ASSISTANT: ") != 1:
            break
        asked = part[: part.index(" ASSISTANT: ") + len(" ASSISTANT: ")]
        first = place + len(count(asked)) - 2
        place += len(count(part))
        for i in range(max(first, 0), min(place, len(ids))):
            supervised[i] = True
    real = sum(i != tokenizer.pad_token_id for i in ids)
    if place < max_length and place != real:
        supervised = [False] * len(ids)
    return ids, [token if known else IGNORE for token, known in zip(ids, supervised, strict=True)]


def encode(turns, template, tokenizer, *, has_image=True, max_length=2048):
    return encode_conversation(turns, template=template, tokenizer=tokenizer, has_image=has_image, max_length=max_length)


def assert_equals_oracle(turns, template, tokenizer, has_image, max_length=2048):
    prepared = oracle_image_first(turns) if has_image else list(turns)
    if template == "plain":
        ids, labels = oracle_plain(prepared, tokenizer)
    else:
        ids, labels = oracle_v1(prepared, tokenizer, has_image, max_length)
    found = encode(turns, template, tokenizer, has_image=has_image, max_length=max_length)
    assert found.input_ids.tolist() == ids[:max_length]
    assert found.labels.tolist() == labels[:max_length]
    return found


# --- tokenizers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not legacy"])
def either(request, tmp_path_factory):
    """The golden tokenizer under both settings of ``legacy``."""
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copyfile(GOLDEN / "student" / "tokenizer.model", folder / "tokenizer.model")
    text = (GOLDEN / "student" / "tokenizer_config.json").read_text()
    assert '"legacy": true' in text
    (folder / "tokenizer_config.json").write_text(text.replace('"legacy": true', f'"legacy": {str(request.param).lower()}'))
    return load_tokenizer(folder)


WORDS = [
    "red",
    "a blue  band",
    "What is it?",
    "  two",
    "end ",
    "\n",
    "</s>",
    "caf\u00e9 \u2014",
    "ASSISTANT:",
    "USER: no",
    "\u732b",
    "x" * 30,
]
TEXTS = st.lists(st.sampled_from([*WORDS, " "]) | st.text(max_size=5), max_size=5).map("".join)


def conversations(images=True, turns=4):
    text = st.lists(TEXTS | st.just("<image>"), max_size=3).map(" ".join) if images else TEXTS
    rounds = st.lists(st.tuples(text, TEXTS), min_size=1, max_size=turns)
    return rounds.map(lambda pairs: [(who, said) for pair in pairs for who, said in zip(("human", "gpt"), pair, strict=True)])


@settings(max_examples=150)
@given(conversations(), st.booleans(), st.sampled_from([2048, 40, 3]))
@example([("human", "<image>\nIs it?"), ("gpt", "no </s> yes")], False, 2048)
@example([("human", "a"), ("gpt", ""), ("human", "b"), ("gpt", "c")], False, 2048)
@example([("human", "a"), ("gpt", "Well ASSISTANT: so")], False, 2048)
def test_ids_and_labels_of_any_v1_conversation_follow_the_rules_of_the_reference(either, turns, greeted, max_length):
    turns = [("gpt", "Hello!"), *turns] if greeted else turns
    has_image = any("<image>" in text for _, text in turns)
    assert_equals_oracle(turns, "v1", either, has_image, max_length)


@settings(max_examples=100)
@given(conversations(turns=1), st.sampled_from([2048, 7]))
def test_ids_and_labels_of_any_plain_pair_follow_the_rules_of_the_reference(either, turns, max_length):
    assert_equals_oracle(turns, "plain", either, any("<image>" in text for _, text in turns), max_length)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=60)
@given(conversations(turns=1))
def test_labels_are_the_ids_or_masked_and_an_image_is_never_supervised(tokenizer, template, turns):
    has_image = any("<image>" in text for _, text in turns)
    encoded = encode(turns, template, tokenizer, has_image=has_image)
    assert encoded.input_ids.dtype == encoded.labels.dtype == np.int64
    assert len(encoded.input_ids) == len(encoded.labels)
    known = encoded.labels != IGNORE
    assert (encoded.labels[known] == encoded.input_ids[known]).all()
    assert not known[encoded.input_ids == IMAGE].any()
    assert encoded.images == sum(text.count("<image>") for _, text in turns)
    assert encoded.supervised == known[1:].sum()


# --- promises by example -----------------------------------------------------------------------------------------------


def supervised_text(encoded, tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(encoded.labels[encoded.labels != IGNORE].tolist())
    return "".join(pieces).replace("\u2581", "")


def test_the_supervised_tokens_are_the_answers_and_their_ends(tokenizer):
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "A wave."), ("human", "Large?"), ("gpt", "No.")]
    encoded = assert_equals_oracle(turns, "v1", tokenizer, True)
    assert supervised_text(encoded, tokenizer) == "Awave.</s>No.</s>"


def test_a_text_only_sample_has_answers_and_no_placeholder(tokenizer):
    encoded = assert_equals_oracle([("human", "Two and two?"), ("gpt", "Four")], "v1", tokenizer, False)
    assert encoded.images == 0
    assert supervised_text(encoded, tokenizer) == "Four</s>"


def test_the_tag_is_plain_text_in_a_sample_without_image(tokenizer):
    turns = [("human", "What does <image> mean?"), ("gpt", "A tag")]
    assert encode(turns, "v1", tokenizer, has_image=False).images == 0
    assert IMAGE not in encode_question(turns, template="v1", tokenizer=tokenizer, has_image=False)


def test_several_images_of_one_turn_are_all_kept_at_its_front(tokenizer):
    turns = [("human", "Compare <image> with <image> please"), ("gpt", "Same")]
    encoded = assert_equals_oracle(turns, "v1", tokenizer, True)
    text = f"{SYSTEM} USER: <image>\n<image>\nCompare  with  please ASSISTANT: Same</s>"
    assert encoded.input_ids.tolist() == tokenize_with_images(text, tokenizer)
    assert encoded.images == 2


def test_images_of_several_turns_stay_in_their_turns(tokenizer):
    turns = [("human", "One <image>"), ("gpt", "A"), ("human", "Two\n<image>"), ("gpt", "B")]
    encoded = assert_equals_oracle(turns, "v1", tokenizer, True)
    text = f"{SYSTEM} USER: <image>\nOne ASSISTANT: A</s>USER: <image>\nTwo ASSISTANT: B</s>"
    assert encoded.input_ids.tolist() == tokenize_with_images(text, tokenizer)
    assert supervised_text(encoded, tokenizer) == "A</s>B</s>"


def test_a_conversation_is_cut_at_max_length_and_says_so(tokenizer):
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "A long answer " * 20)]
    whole = encode(turns, "v1", tokenizer)
    length = len(whole.input_ids)
    assert not whole.truncated
    assert not encode(turns, "v1", tokenizer, max_length=length).truncated
    cut = encode(turns, "v1", tokenizer, max_length=length - 30)
    assert cut.truncated
    assert cut.input_ids.tolist() == whole.input_ids.tolist()[: length - 30]
    assert cut.labels.tolist() == whole.labels.tolist()[: length - 30]
    assert 0 < cut.supervised < whole.supervised


def test_an_image_cut_away_is_not_counted(tokenizer):
    encoded = encode([("human", "<image>\nWhat?"), ("gpt", "That")], "v1", tokenizer, max_length=10)
    assert encoded.truncated
    assert encoded.images == 0
    assert encoded.supervised == 0


def test_a_first_turn_of_the_assistant_is_left_out(tokenizer):
    turns = [("human", "<image>\nWhat?"), ("gpt", "That")]
    with_greeting = encode([("gpt", "Hello"), *turns], "v1", tokenizer)
    assert with_greeting.input_ids.tolist() == encode(turns, "v1", tokenizer).input_ids.tolist()
    assert with_greeting.labels.tolist() == encode(turns, "v1", tokenizer).labels.tolist()


@settings(max_examples=80)
@given(conversations(), TEXTS.filter(lambda text: text.strip()), st.sampled_from([2048, 40]))
def test_the_text_of_a_system_turn_takes_the_place_of_the_templates_own(either, turns, system, max_length):
    has_image = any("<image>" in text for _, text in turns)
    assume("</s>" not in system and " ASSISTANT: " not in system + " ")
    assert_equals_oracle([("system", system), *turns], "v1", either, has_image, max_length)
    blank = encode([("system", " \n"), *turns], "v1", either, has_image=has_image)
    without = encode(turns, "v1", either, has_image=has_image)
    assert blank.input_ids.tolist() == without.input_ids.tolist()
    assert blank.labels.tolist() == without.labels.tolist()


@pytest.mark.parametrize("mark", ["</s>", " ASSISTANT: ", " ASSISTANT:"])
def test_a_system_turn_that_would_move_the_labels_is_refused_with_what_it_holds(tokenizer, mark):
    turns = [("system", f"Say so{mark}"), ("human", "a"), ("gpt", "b")]
    with pytest.raises(PromptError, match=f"its system turn holds '{mark.strip()}'"):
        encode(turns, "v1", tokenizer, has_image=False)


def test_a_template_without_a_place_for_a_system_turn_refuses_it(tokenizer):
    turns = [("system", "Be brief."), ("human", "<image>"), ("gpt", "b")]
    for use in (encode, lambda *given: encode_question(given[0], template="plain", tokenizer=tokenizer, has_image=True)):
        with pytest.raises(PromptError, match="the template plain has no place for a system turn"):
            use(turns, "plain", tokenizer)
    blank = encode([("system", ""), *turns[1:]], "plain", tokenizer)
    assert blank.input_ids.tolist() == encode(turns[1:], "plain", tokenizer).input_ids.tolist()


def test_an_image_in_a_system_turn_is_refused(tokenizer):
    with pytest.raises(PromptError, match="its system turn holds an image"):
        encode([("system", "See <image>"), ("human", "a"), ("gpt", "b")], "v1", tokenizer)


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_empty_answer_is_encoded_as_the_reference_does(tokenizer, template):
    encoded = assert_equals_oracle([("human", "<image>\nWhat?"), ("gpt", "")], template, tokenizer, True)
    assert encoded.supervised == (0 if template == "v1" else len(tokenizer("\n").input_ids) - 1)


def test_double_spaces_are_kept(tokenizer):
    twice = encode([("human", "a  b"), ("gpt", "c  d")], "v1", tokenizer, has_image=False)
    once = encode([("human", "a b"), ("gpt", "c d")], "v1", tokenizer, has_image=False)
    assert twice.input_ids.tolist() != once.input_ids.tolist()
    assert_equals_oracle([("human", "a  b"), ("gpt", "c  d")], "v1", tokenizer, False)


def test_an_end_mark_inside_a_text_is_handled_as_the_reference_does(tokenizer):
    for turns in (
        [("human", "say </s> now"), ("gpt", "fine")],
        [("human", "now"), ("gpt", "fine</s>and more")],
        [("human", "<image>\nnow </s>"), ("gpt", "fine"), ("human", "x"), ("gpt", "y</s>")],
    ):
        assert_equals_oracle(turns, "v1", tokenizer, "<image>" in turns[0][1])


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [("human", "<image>")],
        [("human", "<image>"), ("gpt", "a"), ("human", "b")],
        [("human", "<image>"), ("gpt", "a")] * 2,
    ],
    ids=["none", "one", "three", "four"],
)
def test_plain_takes_two_turns_only(tokenizer, turns):
    with pytest.raises(PromptError, match=f"found {len(turns)} turns"):
        encode(turns, "plain", tokenizer)


@pytest.mark.parametrize(
    "turns",
    [
        [("human", "a"), ("human", "b")],
        [("human", "a"), ("gpt", "b"), ("gpt", "c")],
        [("human", "a"), ("system", "b")],
        [("human", "a"), ("gpt", "b"), ("system", "c"), ("human", "d"), ("gpt", "e")],
        [("system", "a"), ("system", "b"), ("human", "c"), ("gpt", "d")],
        [("system", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")],
        [("gpt", "a"), ("gpt", "b")],
    ],
)
def test_turns_that_do_not_alternate_are_refused(tokenizer, turns):
    with pytest.raises(PromptError, match="alternate"):
        encode(turns, "v1", tokenizer, has_image=False)


def test_an_unknown_template_is_refused_by_name(tokenizer):
    with pytest.raises(ValueError, match="template is 'v2'; known are v1, plain"):
        encode([("human", "a"), ("gpt", "b")], "v2", tokenizer)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=60)
@given(conversations(turns=2))
def test_a_question_is_the_conversation_up_to_its_last_answer(tokenizer, template, turns):
    if template == "plain":
        turns = turns[:2]
    assume(turns[-1][1].strip() and "</s>" not in turns[-1][1])
    has_image = any("<image>" in text for _, text in turns)
    question = encode_question(turns, template=template, tokenizer=tokenizer, has_image=has_image)
    whole = encode(turns, template, tokenizer, has_image=has_image)
    assert whole.input_ids[: len(question)].tolist() == question.tolist()
    if whole.supervised and template == "v1":
        last = turns[-1][1]
        assert len(whole.input_ids) - len(question) >= len(tokenizer(last).input_ids) - 1


def test_a_question_needs_an_answer_to_compare_with(tokenizer):
    for turns in ([], [("human", "a")]):
        with pytest.raises(PromptError, match="last turn"):
            encode_question(turns, template="v1", tokenizer=tokenizer, has_image=False)


# --- the tokenizer itself ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(TEXTS)
@settings(max_examples=80)
def test_without_special_tokens_the_ids_are_those_of_sentencepiece(either, text):
    import sentencepiece

    assume("</s>" not in text and "<" not in text and "\u2581" not in text)
    model = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "student" / "tokenizer.model"))
    # Without legacy, spaces at the front of a text are kept where SentencePiece itself may drop them.
    assume(either.legacy or (text and not text.startswith(" ")))
    assert either(text).input_ids == [1, *model.encode(text)]


def test_legacy_says_whether_a_word_start_follows_a_special_token(either):
    pieces = either.convert_ids_to_tokens(either("a</s>USER").input_ids)
    after = pieces[pieces.index("</s>") + 1]
    assert after.startswith("\u2581") == either.legacy


@given(TEXTS)
@settings(max_examples=40)
def test_a_pickled_tokenizer_gives_the_same_ids(either, text):
    twin = pickle.loads(pickle.dumps(either))
    assert twin(text).input_ids == either(text).input_ids
    assert twin.encode_chunk(text) == tuple(either(text).input_ids)
    assert twin.legacy == either.legacy
    assert (twin.bos_token_id, twin.eos_token_id, twin.pad_token_id) == (1, 2, 0)


def test_a_tokenizer_without_pad_token_pads_with_the_unknown_token(tmp_path):
    shutil.copyfile(GOLDEN / "student" / "tokenizer.model", tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).pad_token_id == 0
