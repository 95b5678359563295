"""Chat templates in the manner of well-known families, and what of an answer each of them renders: rules written by hand.

``@IMAGE@`` in a template stands for what the family at hand writes for an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "templates"
CHATML = ("<|im_start|>", "<|im_end|>")


def as_it_stands(text: str, last: bool) -> str:
    del last
    return text


def stripped(text: str, last: bool) -> str:
    del last
    return text.strip()


def without_thoughts(text: str, last: bool) -> str:
    del last
    return text.split("</think>", 1)[-1]


def last_with_thoughts(text: str, last: bool) -> str:
    """The thoughts of the last turn alone, as Qwen's: line breaks around them are the template's."""
    if "</think>" not in text:
        return text.lstrip("\n")
    thought, answer = text.split("</think>")[0].split("<think>")[-1].strip("\n"), text.split("</think>")[-1].lstrip("\n")
    return f"<think>\n{thought}\n</think>\n\n{answer}" if last else answer


def tool_calls(text: str, last: bool) -> str:
    del last
    if not text.startswith("<tool_call>"):
        return text
    return f"<tool_call>\n{text.removeprefix('<tool_call>').replace('</tool_call>', '').strip()}\n</tool_call>"


@dataclass(frozen=True)
class Row:
    """``end``: what ends an answer; ``written``: whether the template writes it, after an answer that others follow and after
    the last; ``answer(text, last)``: what it renders of an answer; ``generated``: whether earlier answers are supervised."""

    specials: tuple[str, ...]
    end: str
    answer: Callable[[str, bool], str] = as_it_stands
    written: tuple[bool, bool] = (True, True)
    eos: str | None = None
    earlier_generated: bool = True
    space_before: bool = False
    """Whether the template ends with a space before an answer, which the answer's first token may hold."""


TABLE = {
    "chatml": Row(CHATML, "<|im_end|>"),
    "system_default": Row(CHATML, "<|im_end|>"),
    "llama3_date": Row(("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", stripped),
    "qwen3_thinking": Row(CHATML, "<|im_end|>", last_with_thoughts),
    "mistral_inst": Row(("[INST]", "[/INST]"), "</s>"),
    "gemma_turns": Row(("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", stripped, eos="</s>"),
    "phi": Row(("<|user|>", "<|assistant|>", "<|end|>"), "<|end|>", eos="</s>"),
    "deepseek": Row(("<|User|>", "<|Assistant|>"), "</s>", without_thoughts),
    "utterances": Row(("<end_of_utterance>",), "<end_of_utterance>", space_before=True),
    "tools_header": Row(CHATML, "<|im_end|>", tool_calls),
    "generation_blocks": Row(CHATML, "<|im_end|>"),
    "last_generated": Row(CHATML, "<|im_end|>", earlier_generated=False),
    "vicuna_open": Row((), "</s>", written=(False, False), space_before=True),
    "end_between": Row((), "</s>", written=(True, False), space_before=True),
    "strip_all": Row((*CHATML, "<|im_sep|>"), "\n<|im_end|>", stripped, eos="<|im_end|>"),
    "no_think_switch": Row(CHATML, "<|im_end|>"),
}

CONVERSATIONS = {
    "one": ("<image>\nWhat is it?", "a dog"),
    "turns": ("<image>\nWhat is it?", "a dog", "And the mat?", "red  or\ngreen"),
    "same words": ("a dog", "a dog", "a dog", "a dog"),
    "words of templates": ("user", "assistant", "system", "model"),
    "code": ("Go on:\n\ndef f(x):\n", "    y = x\n    return y\n"),
    "inline": ("Is <image> larger than <image> or not?", "yes"),
    "wide spaces": ("why", "\u3000so it is\u00a0"),
    "blank": ("why", " \n"),
    "thoughts": ("<image>\nWhat is it?", "<think>\nround and red\n</think>\n\na ball"),
    "earlier thoughts": ("<image>\nWhat?", "<think>\nround\n</think>\n\na ball", "Is it big?", "no"),
    "thoughts of nothing": ("What?", "<think>\n\n</think>\n\na ball"),
    "a call": ("Weather?", '<tool_call>\n{"name": "weather"}\n</tool_call>'),
    "a switch": ("Is it? /no_think", "yes, it is"),
    "unicode": ("\u65e5\u672c?", "caf\u00e9 \U0001f600\U000f0000 \u0e01"),
    "markup": ("{{ a }} {% b %}", "<b>&amp;</b> {{ messages }} {% endif %}"),
}
"""Texts, question and answer in turn."""
