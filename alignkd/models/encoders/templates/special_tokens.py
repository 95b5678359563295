"""Which tokens a text may not hold: those that make up a prompt's structure, and no others.

A text that holds the end of a turn would end it. Tokens that a model is trained to write as text, for thoughts, tools, places
in an image or what it reads there (``<think>``, ``<tool_call>``, ``<ref>``, ``<loc0001>``), are text.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_IMAGE_WORDS = {
    "image",
    "images",
    "img",
    "vision",
    "video",
    "videos",
    "audio",
    "media",
    "patch",
    "pixel",
    "frame",
    "row",
    "col",
}
_TURN_WORDS = {
    *("im", "bos", "eos", "bot", "eot", "eom", "eod", "endoftext", "turn", "header", "inst", "sys", "system", "user"),
    *("assistant", "human", "utterance", "message", "role"),
}
_WRITTEN_WORDS = {
    *("think", "thinking", "thought", "reason", "reasoning", "tool", "tools", "call", "function", "ref", "object"),
    *("box", "quad", "point", "poly", "polygon", "loc", "seg", "ocr", "answer", "reflection"),
}


def special_tokens(tokenizer: Any) -> list[str]:
    """All special tokens, the longest first: a tokenizer names only some of them (Gemma's end of a turn has no name)."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return _longest_first(added | set(map(str, tokenizer.all_special_tokens)))


def structure_tokens(
    tokenizer: Any, *, image_texts: Iterable[str] = (), template_text: str = "", read: Collection[str] = ()
) -> list[str]:
    """The special tokens that a text may not hold, the longest first.

    ``image_texts``: tokens that stand for images. ``template_text``: what the chat template writes itself; of the special
    tokens there, those are text that it looks for in texts (``read``), or whose name says that models write them.
    """
    named = {str(getattr(tokenizer, name)) for name in _NAMED if getattr(tokenizer, name, None)}
    named |= {str(token) for token in image_texts if token}
    found = {token for token in special_tokens(tokenizer) if _is_structure(token, template_text, read)}
    return _longest_first(named | found)


def _is_structure(token: str, template_text: str, read: Collection[str]) -> bool:
    words = set(re.findall(r"[a-z]+", token.lower()))
    if words & _WRITTEN_WORDS:
        return False
    return bool(words & (_IMAGE_WORDS | _TURN_WORDS)) or (token in template_text and not any(token in text for text in read))


def _longest_first(tokens: Iterable[str]) -> list[str]:
    return sorted(tokens, key=len, reverse=True)
