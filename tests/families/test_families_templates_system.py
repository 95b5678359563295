"""System turns through chat templates: shown where the template has them, refused by name where it does not."""

from __future__ import annotations

import numpy as np
import pytest
from template_table import TABLE
from test_families_templates import CHATML_END, CHATML_START, SHOWN, images_of, processor_of, supervised_of

from alignkd.inputs.prompts import IGNORE, PromptError
from alignkd.models.encoders.chat import ChatEncoder
from alignkd.models.encoders.processors import load_processor
from alignkd.models.loading import load_vlm

DATE = "2024-02-29T23:59:58"
SYSTEM = "Answer as a sailor would:\n\U0001f600 aye."
TURNS = [
    ("system", SYSTEM),
    ("human", "<image>\nWhat is it?"),
    ("gpt", "a dog"),
    ("human", "And the mat?"),
    ("gpt", "it is red"),
]
REFUSE = {"mistral_inst": "roles must alternate"}
"""Templates of the table that take no system turn, and what they say."""


@pytest.fixture(scope="module")
def encoder_of(written):
    made = {}

    def make(family, name):
        if (family, name) not in made:
            folder = written(family)
            processor = processor_of(folder, family, name)
            token = load_vlm(folder).image_token_id
            made[family, name] = ChatEncoder(
                folder, family, token, frozenset(), lambda *given: [], 4096, processor=processor, date=DATE
            )
        return made[family, name]

    return make


def own_ids(processor, row, turns, images, *, as_text=False):
    """Through the processor's own ``apply_chat_template``."""
    left, messages = list(images), []
    for number, (speaker, text) in enumerate(turns):
        end = row.end if speaker == "gpt" and not row.written[number == len(turns) - 1] else ""
        content = []
        for position, part in enumerate(text.split("<image>")):
            content += [{"type": "image", "image": left.pop(0)}] if position else []
            content += [{"type": "text", "text": part + end}] if part + end else []
        role = {"human": "user", "gpt": "assistant", "system": "system"}[speaker]
        messages.append({"role": role, "content": text if as_text and role == "system" else content})
    source = processor.chat_template.replace("strftime_now('%d %b %Y')", f"'{SHOWN}'")
    made = processor.apply_chat_template(messages, chat_template=source, tokenize=True, return_dict=True, return_tensors="np")
    return made["input_ids"][0].tolist()


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_ids_are_those_of_the_processor_and_supervised_are_the_answers_alone(written, encoder_of, family, name):
    encoder, images = encoder_of(family, name), images_of([text for _, text in TURNS])
    if name in REFUSE:
        for use in (encoder.encode, encoder.question):
            with pytest.raises(PromptError, match=f"no place for a system turn .*{REFUSE[name]}"):
                use(TURNS, images)
        return
    made, _ = encoder.encode(TURNS, images)
    processor = processor_of(written(family), family, name)
    assert made.input_ids.tolist() == own_ids(processor, TABLE[name], TURNS, images)
    without, _ = encoder.encode(TURNS[1:], images)
    assert supervised_of(encoder, made) == supervised_of(encoder, without)
    words = "".join("".join(text.replace("<image>", "").split()) for _, text in TURNS)
    sailor = len("".join(SYSTEM.split()))
    told = "".join(
        words[start:end] for start, end in dict.fromkeys(map(tuple, made.spans[made.spans[:, 1] <= sailor].tolist()))
    )
    assert told == words[:sailor]
    assert (made.labels[made.spans[:, 1] <= sailor] == IGNORE).all()


def encoder_with(folder, source):
    processor = load_processor(folder, "qwen3_vl")
    processor.chat_template = source
    return ChatEncoder(folder, "qwen3_vl", 4, frozenset(), lambda *given: [], 4096, processor=processor)


PLAIN = [(speaker, text.replace("<image>\n", "")) for speaker, text in TURNS]
INTO_FIRST = (
    "{%- set first = messages[0].role == 'system' -%}{%- for m in (messages[1:] if first else messages) -%}"
    "{{- '<|im_start|>' + m.role + '\n' -}}{%- if loop.first and first -%}{{- messages[0].content[0].text + '\n\n' -}}"
    "{%- endif -%}{%- for p in m.content -%}{{- p.text -}}" + CHATML_END
)
INTO_LAST = INTO_FIRST.replace("if loop.first and", "if m.role == 'user' and loop.index0 >= loop.length - 2 and")
AS_TEXT = CHATML_START.replace(
    "{%- for p in m.content -%}",
    "{%- if m.role == 'system' -%}{{- m.content -}}{%- endif -%}{%- for p in m.content if m.role != 'system' -%}",
)
SILENT = {
    "no system turns": CHATML_START.replace("in messages", "in messages if m.role != 'system'") + "{{- p.text -}}" + CHATML_END,
    "a part of it": f"{CHATML_START}{{{{- p.text[:6] if m.role == 'system' else p.text -}}}}{CHATML_END}",
    "known words alone": (
        "{%- set known = messages[0].content[0].text == 'Be kind.' -%}"
        + CHATML_START.replace("in messages", "in messages if m.role != 'system' or not known")
        + "{{- p.text -}}"
        + CHATML_END
    ),
}


@pytest.mark.parametrize("source", [INTO_FIRST, INTO_LAST], ids=["first question", "last question"])
def test_a_template_may_write_the_system_text_into_a_question(written, source):
    folder = written("qwen3_vl")
    encoder = encoder_with(folder, source)
    made, _ = encoder.encode(PLAIN, [])
    assert made.input_ids.tolist() == own_ids(encoder.processor, TABLE["chatml"], PLAIN, [])
    assert supervised_of(encoder, made) == ["a dog<|im_end|>", "it is red<|im_end|>"]
    text = "".join("".join(text.split()) for _, text in PLAIN)
    shown = np.zeros(len(text), dtype=bool)
    for start, end in made.spans.tolist():
        shown[start:end] = True
    assert shown.all()
    answers = dict.fromkeys(map(tuple, made.spans[made.labels != IGNORE].tolist()))
    assert "".join(text[start:end] for start, end in answers) == "adogitisred"


def test_a_template_that_takes_the_system_turn_as_one_text_is_given_it_so(written):
    encoder = encoder_with(written("qwen3_vl"), AS_TEXT + "{{- p.text -}}" + CHATML_END)
    made, _ = encoder.encode(PLAIN, [])
    assert made.input_ids.tolist() == own_ids(encoder.processor, TABLE["chatml"], PLAIN, [], as_text=True)
    assert encoder.tokenizer.decode(made.input_ids).startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>")


@pytest.mark.parametrize("kind", SILENT)
def test_a_template_that_leaves_a_system_turn_out_is_never_used_with_one(written, kind):
    encoder = encoder_with(written("qwen3_vl"), SILENT[kind])
    turns = [("system", "Be kind."), *PLAIN[1:]]
    for use in (encoder.encode, encoder.question, lambda turns, images: encoder.plan(turns, 0)):
        with pytest.raises(PromptError, match=r"leaves out .* a system turn"):
            use(turns, [])
    assert encoder.encode(PLAIN[1:], [])


def test_a_system_turn_in_the_middle_is_for_templates_that_take_it(written):
    turns = [*PLAIN[1:3], ("system", "Be brief now."), *PLAIN[3:]]
    folder = written("qwen3_vl")
    encoder = encoder_with(folder, CHATML_START + "{{- p.text -}}" + CHATML_END)
    made, _ = encoder.encode(turns, [])
    assert made.input_ids.tolist() == own_ids(encoder.processor, TABLE["chatml"], turns, [])
    with pytest.raises(PromptError, match=r"leaves out 'Be brief now\.'"):
        encoder_with(
            folder,
            INTO_FIRST.replace("m.role + '\\n'", "'x'").replace(
                "for p in m.content", "for p in m.content if m.role != 'system'"
            ),
        ).encode(turns, [])


@pytest.mark.parametrize("text", ["stop <|im_end|> here", "see <image>"])
def test_what_a_system_turn_may_not_hold_is_refused(written, text):
    encoder = encoder_with(written("qwen3_vl"), CHATML_START + "{{- p.text -}}" + CHATML_END)
    with pytest.raises(PromptError, match=r"special token|system turn holds an image"):
        encoder.plan([("system", text), ("human", "<image>\na"), ("gpt", "b")], 1, [(8, 8)])


def test_v1_gives_the_system_text_in_place_of_its_own(written):
    vlm = load_vlm(written("qwen2_5_vl"))
    encoder = vlm.encoder("v1", 2048)
    rendered = encoder.render(PLAIN, 0)
    end = vlm.tokenizer.eos_token
    assert rendered.text == (f"{SYSTEM} USER: What is it? ASSISTANT: a dog{end}USER: And the mat? ASSISTANT: it is red{end}")
    made, _ = encoder.encode(PLAIN, [])
    words = "".join("".join(text.split()) for _, text in PLAIN)
    told = "".join(words[start:end] for start, end in dict.fromkeys(map(tuple, made.spans.tolist())))
    assert told == words
    with pytest.raises(PromptError, match="turn 2 is a system turn"):
        encoder.render([*PLAIN[1:3], ("system", "Be brief now."), *PLAIN[3:]], 0)
