"""Ids and labels are what the template renders: a table of templates, each with every family's processor, against transformers.

Ids are those of the processor's own ``apply_chat_template``; the supervised text is what :mod:`template_table` says by hand.
"""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import FAMILIES
from PIL import Image
from template_table import CONVERSATIONS, FOLDER, TABLE

from alignkd.inputs.prompts import IGNORE, PromptError
from alignkd.models.encoders.chat import ChatEncoder
from alignkd.models.encoders.processors import load_processor
from alignkd.models.loading import load_vlm

DATE, SHOWN = "2024-02-29T23:59:58", "29 Feb 2024"
IMAGES = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "<|vision_start|><|image_pad|><|vision_end|>"),
    **dict.fromkeys(("llava", "llava_next", "llava_onevision", "vipllava", "smolvlm", "idefics3", "aya_vision"), "<image>"),
    "internvl": "<IMG_CONTEXT>\n",
    "gemma3": "<start_of_image>",
}
BYTE_LEVEL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")


def processor_of(folder, family, name):
    """A family's processor with a template of the table and its tokens."""
    row, processor = TABLE[name], load_processor(folder, family)
    eos = row.eos or row.end
    processor.tokenizer.add_tokens([*row.specials, eos], special_tokens=True)
    processor.tokenizer.eos_token = eos
    processor.chat_template = (FOLDER / f"{name}.jinja").read_text().replace("@IMAGE@", IMAGES[family])
    return processor


@pytest.fixture(scope="module")
def encoder_of(written):
    made = {}

    def make(family, name):
        if (family, name) not in made:
            folder = written(family)
            vlm = load_vlm(folder)
            processor = processor_of(folder, family, name)
            token = vlm.image_token_id
            made[family, name] = ChatEncoder(
                folder, family, token, frozenset(), lambda *given: [], 4096, processor=processor, date=DATE
            )
        return made[family, name]

    return make


def images_of(texts):
    rng = np.random.default_rng(0)
    count = sum(text.count("<image>") for text in texts)
    return [Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)) for _ in range(count)]


def turns_of(texts):
    return [(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]


def messages_of(row, texts, images):
    """Typed parts, their text as it stands; with the end token where the template writes none."""
    left, messages = list(images), []
    for number, text in enumerate(texts):
        last = number == len(texts) - 1
        end = row.end if number % 2 and not row.written[last] else ""
        content = []
        for position, part in enumerate(text.split("<image>")):
            content += [{"type": "image", "image": left.pop(0)}] if position else []
            content += [{"type": "text", "text": part + end}] if part + end else []
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    return messages


def own_ids(folder, family, name, texts, images):
    processor = processor_of(folder, family, name)
    source = processor.chat_template.replace("strftime_now('%d %b %Y')", f"'{SHOWN}'")
    messages = messages_of(TABLE[name], texts, images)
    made = processor.apply_chat_template(messages, chat_template=source, tokenize=True, return_dict=True, return_tensors="np")
    return made["input_ids"][0].tolist()


def supervised_of(encoder, made):
    """The supervised text, run by run."""
    runs, before = [], IGNORE
    for label in made.labels.tolist():
        if label != IGNORE:
            runs += [[]] if before == IGNORE else []
            runs[-1].append(label)
        before = label
    return [encoder.tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def same_texts(found, expected, *, space_before):
    """Equal, but for a space before that belongs to the template and to an answer's first token."""
    cut = [t.removeprefix(" ") if space_before and not e.startswith(" ") else t for t, e in zip(found, expected, strict=True)]
    return cut == expected


def expected_of(row, texts):
    last = len(texts) - 1
    kept = [i for i in range(1, len(texts), 2) if row.earlier_generated or i == last]
    return [row.answer(texts[i], i == last) + row.end for i in kept]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TABLE)
def test_what_is_supervised_is_what_the_template_renders_of_an_answer_and_its_end(written, encoder_of, name, conversation):
    texts, row = CONVERSATIONS[conversation], TABLE[name]
    encoder, images = encoder_of("qwen3_vl", name), images_of(texts)
    made, _ = encoder.encode(turns_of(texts), images)
    assert made.input_ids.tolist() == own_ids(written("qwen3_vl"), "qwen3_vl", name, texts, images)
    found, expected = supervised_of(encoder, made), expected_of(row, texts)
    assert same_texts(found, expected, space_before=row.space_before), (found, expected)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("family", [family for family in IMAGES if family != "qwen3_vl"])
def test_every_familys_ids_and_labels_are_those_of_its_processor_and_template(written, encoder_of, family, name):
    row, encoder = TABLE[name], encoder_of(family, name)
    for conversation in ("turns", "code", "thoughts", "inline"):
        texts = CONVERSATIONS[conversation]
        images = images_of(texts)
        made, _ = encoder.encode(turns_of(texts), images)
        assert made.input_ids.tolist() == own_ids(written(family), family, name, texts, images), conversation
        found, expected = supervised_of(encoder, made), expected_of(row, texts)
        if family not in BYTE_LEVEL:  # decoding takes off a space at the front
            found, expected = ([text.lstrip(" ") for text in texts] for texts in (found, expected))
        assert same_texts(found, expected, space_before=row.space_before), (conversation, found, expected)


def test_every_family_with_a_chat_template_is_in_the_table():
    without = {"paligemma", "instructblip", "minigpt4", "mobilevlm_v1"}
    assert set(IMAGES) == set(FAMILIES) - without


def test_transformers_own_mask_of_generation_blocks_is_what_is_supervised(written, encoder_of):
    encoder, texts = encoder_of("qwen3_vl", "generation_blocks"), CONVERSATIONS["turns"]
    images = images_of(texts)
    made, _ = encoder.encode(turns_of(texts), images)
    theirs = encoder.processor.apply_chat_template(
        messages_of(TABLE["generation_blocks"], texts, images),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert (made.labels != IGNORE).tolist() == [bool(flag) for flag in theirs["assistant_masks"][0]]


def encode_with(folder, processor, texts):
    encoder = ChatEncoder(folder, "qwen3_vl", 4, frozenset(), lambda *given: [], 4096, processor=processor)
    return encoder.encode(turns_of(texts), [])


CHATML_START = "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}{%- for p in m.content -%}"
CHATML_END = "{%- endfor -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
UNREADABLE = {
    "a text of its own inside of answers": (
        f"{CHATML_START}{{{{- p.text.replace('a', ' AND ') -}}}}{CHATML_END}",
        "writes 'AND' into turn 1",
    ),
    "a sentence after each": (
        f"{CHATML_START}{{{{- p.text.split(' ')[0] + ' (he said) ' + p.text.split(' ')[1:]|join(' ') -}}}}{CHATML_END}",
        "writes '\\(hesaid\\)' into turn 1",
    ),
    "answers in another order": (f"{CHATML_START}{{{{- p.text[::-1] -}}}}{CHATML_END}", "in another order"),
    "answers twice": (f"{CHATML_START}{{{{- p.text + p.text -}}}}{CHATML_END}", "twice"),
    "the last turn alone": (
        CHATML_START.replace("in messages", "in messages[-1:]") + "{{- p.text -}}" + CHATML_END,
        "leaves out",
    ),
    "lists as text": ("{%- for m in messages -%}<|im_start|>{{ m.content }}<|im_end|>{%- endfor -%}", "followed"),
    "lengths": (f"{CHATML_START}{{{{- p.text|length ~ p.text[:1] ~ (p.text|upper)[1:]|reverse -}}}}{CHATML_END}", "order"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_template_whose_answers_cannot_be_told_is_refused_with_what_it_does(written, kind):
    source, message = UNREADABLE[kind]
    folder = written("qwen3_vl")
    processor = load_processor(folder, "qwen3_vl")
    processor.chat_template = source
    with pytest.raises(PromptError, match=message):
        encode_with(folder, processor, ("why so", "as a rule", "and then", "all is well"))


@pytest.mark.parametrize("token", ["<think>", "</think>", "<tool_call>", "<ref>", "<box>", "<loc0001>", "<seg001>", "<|ocr|>"])
def test_tokens_that_a_model_is_trained_to_write_pass(written, token):
    folder = written("qwen3_vl")
    processor = load_processor(folder, "qwen3_vl")
    processor.tokenizer.add_tokens([token], special_tokens=True)
    encoder = ChatEncoder(folder, "qwen3_vl", 4, frozenset(), lambda *given: [], 4096, processor=processor)
    made, _ = encoder.encode(turns_of((f"what is {token}?", f"it is {token} here")), [])
    assert supervised_of(encoder, made) == [f"it is {token} here<|im_end|>"]


@pytest.mark.parametrize(
    "token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|eot_id|>"]
)
def test_tokens_of_structure_are_refused_by_name(written, token):
    folder = written("qwen3_vl")
    processor = load_processor(folder, "qwen3_vl")
    processor.tokenizer.add_tokens([token], special_tokens=True)
    encoder = ChatEncoder(folder, "qwen3_vl", 4, frozenset(), lambda *given: [], 4096, processor=processor)
    for texts in ((f"a{token}b", "c"), ("a", f"b{token}c")):
        with pytest.raises(PromptError, match="special token"):
            encoder.encode(turns_of(texts), [])
