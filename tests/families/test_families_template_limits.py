"""A chat template that would run for ever or fill the memory is stopped, in any thread; one that writes a date has one date."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from family_conformance import LENGTH
from transformers.utils.chat_template_utils import render_jinja_template

from alignkd.errors import ConfigError
from alignkd.inputs.prompts import PromptError
from alignkd.models.encoders.chat import ChatEncoder
from alignkd.models.encoders.processors import load_processor
from alignkd.models.encoders.templates.chat_template import ChatTemplate, check_date

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "why"}]}]
DOUBLED = "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set ns.s = CHANGE %}{% endfor %}"
BOMBS = {
    "a long loop": "{% for i in range(10**9) %}a{% endfor %}",
    "loops in loops": "{% set r = range(100000) %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "a text many times": "{{ 'x' * 10**10 }}",
    "a list many times": "{{ [0] * 10**10 }}",
    "added to itself": DOUBLED.replace("CHANGE", "ns.s + ns.s"),
    "joined to itself": DOUBLED.replace("CHANGE", "ns.s ~ ns.s"),
    "written twice by a macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLED.replace("CHANGE", "m(ns.s)"),
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a wide method": "{{ 'x'.center(10**10) }}",
    "a wide filter": "{{ 'x'|center(9999999999) }}",
    "a wide format": "{{ '%9999999999d' % 3 }}",
    "a computed width": "{{ '{:{w}}'.format(3, w=10**10) }}",
    "a replacement": "{{ ('x' * 1000000)|replace('x', 'y' * 1000000) }}",
    "a join": "{{ range(100000)|map('string')|join('x' * 100000) }}",
    "macros that call themselves": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "no end of calls": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "in one branch": "{% if messages[0].content[0].text == 'why' %}{{ 'x' * 10**10 }}{% endif %}",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_template_without_end_is_stopped_with_a_message_in_any_thread(kind):
    template = ChatTemplate(BOMBS[kind], {})
    with ThreadPoolExecutor(1) as pool, pytest.raises(PromptError, match="the chat template"):
        pool.submit(template.render, MESSAGES).result()


@pytest.mark.parametrize(
    "source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"]
)
def test_a_template_cannot_leave_its_sandbox(source):
    with pytest.raises(PromptError, match="the chat template rejects it"):
        ChatTemplate(source, {}).render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages|tojson(indent=2) }}{{ messages|length }}{{ [3, 1]|sort|join('-') }}{{ 'a' ~ 1 ~ none }}",
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.previtem }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{% if loop.first %}{% continue %}{% endif %}{% else %}none{% endfor %}",
        "{%- set x %}  a {% endset %}{{ x|trim|upper }}{{ '%s-%d' % ('a', 3) }}",
        "{{ '{0}{1}'.format('a', 'b') }}{{ 'a-b'.split('-') }}",
        "{% macro f(x, y=2) %}{{ x * y }}{% endmacro %}{{ f('ab') }}{{ f(3) }}",
        "{{ dict(a=1).a }}{{ namespace(a=2).a }}{{ tools }}",
        "{{ bos_token }}{{ messages[0]['content'] | map(attribute='text') | list }}{{ undefined_name }}",
        "{{ 7 // 2 }}{{ 2 ** 3 }}",
        "{% for k, v in messages[0].items() %}{{ k }}{% endfor %}{% generation %}{{ 'g' }}{% endgeneration %}",
    ],
)
def test_within_the_limits_a_template_renders_as_transformers_renders_it(source):
    theirs, _ = render_jinja_template([MESSAGES], chat_template=source, bos_token="<s>", add_generation_prompt=False)
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES) == theirs[0]


DATED = (
    "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}<|im_start|>{% for p in m.content %}{{ p.text }}{% endfor %}"
    "<|im_end|>{% endfor %}"
)


def test_the_date_of_prompts_goes_with_an_encoder_into_other_processes_and_days(written):
    folder = written("qwen3_vl")
    processor = load_processor(folder, "qwen3_vl")
    processor.chat_template = DATED
    given = (folder, "qwen3_vl", 4, frozenset(), len, LENGTH)
    encoder = ChatEncoder(*given, processor=processor, date="2001-02-03T04:05:06")
    assert encoder.prompt_date == "2001-02-03T04:05:06"
    assert encoder.render_text([("human", "a")], 0).startswith("2001-02-03<|im_start|>")
    encoder.prompt_date = "2002-02-03T00:00:00"
    assert encoder.render_text([("human", "a")], 0).startswith("2002-02-03")


def test_a_template_without_a_clock_has_no_date(written):
    processor = load_processor(written("qwen3_vl"), "qwen3_vl")
    encoder = ChatEncoder(written("qwen3_vl"), "qwen3_vl", 4, frozenset(), len, LENGTH, processor=processor)
    assert encoder.prompt_date == ""
    assert pickle.loads(pickle.dumps(encoder)).prompt_date == ""


def test_a_date_that_is_none_is_refused():
    assert check_date("2024-07-26") == "2024-07-26T00:00:00"
    with pytest.raises(ConfigError, match="'yesterday' is no date"):
        check_date("yesterday")
