"""Where each character of a rendered conversation comes from: its own texts, or the template.

1. The template renders the conversation as it is: that is what the model sees.
2. It renders it again with a tracer in place of each character of its texts that is not white space. Where the two renderings
   are alike but for tracers, each tracer shows what the character there comes from.
3. A template that looks into texts (for ``</think>``, say) takes another way with tracers. Then what its code names is left as
   it is: first what looks like a tag, then all of it.
4. White space at the ends of an answer, and answers of nothing else, are found by rendering without them.

What cannot be found so is refused: no label is guessed.

Shapes: C characters of the rendered text, O of the conversation's own texts, one after the other.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from alignkd.inputs.prompts import PromptError
from alignkd.models.encoders.templates.chat_template import ChatTemplate, Message
from alignkd.models.encoders.templates.codes import FIRST_TRACER, MOST_TRACERS, codes, is_space, text_of, traced
from alignkd.models.encoders.templates.sandbox import CLOSE, OPEN

Build = Callable[[Sequence[str]], list[Message]]
"""Messages with these texts in place of the conversation's own."""


@dataclass(frozen=True)
class Traced:
    """A rendering with its sources: the own character that each comes from, ``[C]``, or -1.

    ``generated_C``: which lie in a generation block, None where the template has none. ``traced_O``: which own characters had
    a tracer.
    """

    template: ChatTemplate
    build: Build
    texts: Sequence[str]
    text: str
    sources_C: np.ndarray
    traced_O: np.ndarray
    generated_C: np.ndarray | None

    @cached_property
    def firsts(self) -> list[int]:
        """The number of each text's first own character, and that of one after the last."""
        return [0, *np.cumsum([len(text) for text in self.texts]).tolist()]

    def rendered_with(self, index: int, text: str) -> str:
        """The conversation with another text in one place."""
        return self.template.render(self.build([*self.texts[:index], text, *self.texts[index + 1 :]]))


def trace(template: ChatTemplate, build: Build, texts: Sequence[str]) -> Traced:
    """Render a conversation and find where its characters come from.

    Raises:
        PromptError: the template rejects it, or changes its texts in a way that cannot be followed.
    """
    if sum(map(len, texts)) >= MOST_TRACERS:
        raise PromptError(f"its texts have {sum(map(len, texts)):,} characters, expected fewer than {MOST_TRACERS:,}")
    text = template.render(build(texts))
    codes_C, own_O = codes(text), codes("".join(texts))
    for kept in _ways(template, "".join(texts)):
        marked, traced_O = _with_tracers(template, build, texts, kept)
        if marked is None:
            continue
        found_C, generated_C = _without_marks(codes(marked))
        sources_C = _sources(codes_C, found_C, own_O, traced_O)
        if sources_C is not None:
            generated = generated_C if template.has_generation_blocks else None
            return Traced(template, build, texts, text, sources_C, traced_O, generated)
    raise PromptError(
        "the chat template changes what it writes with what the texts say, in a way that cannot be followed, so what is the"
        " answer in its prompt is not known"
    )


def _ways(template: ChatTemplate, own: str) -> list[re.Pattern[str] | None]:
    """What to leave without tracers, one attempt after the other."""
    ways: list[re.Pattern[str] | None] = [None]
    present = [literal for literal in template.literals if literal in own and not literal.isspace()]
    tags = [literal for literal in present if len(literal) > 1 and not all(c.isalnum() or c.isspace() for c in literal)]
    for literals in (tags, present):
        if literals and (pattern := re.compile("|".join(map(re.escape, literals)))) not in ways:
            ways.append(pattern)
    return ways


def _with_tracers(
    template: ChatTemplate, build: Build, texts: Sequence[str], kept: re.Pattern[str] | None
) -> tuple[str | None, np.ndarray]:
    made, flags, first = [], [np.zeros(0, dtype=bool)], 0
    for text in texts:
        changed, traced_C = traced(text, first, kept)
        made.append(changed)
        flags.append(traced_C)
        first += len(text)
    try:
        return template.render(build(made), marked=True), np.concatenate(flags)
    except PromptError:
        return None, np.concatenate(flags)


def _without_marks(codes_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rendering without marks of generation blocks, and which characters lie in one."""
    opens, closes = codes_C == ord(OPEN), codes_C == ord(CLOSE)
    depth = np.cumsum(opens.astype(np.int64) - closes)
    kept = ~(opens | closes)
    return codes_C[kept], depth[kept] > 0


def _sources(codes_C: np.ndarray, traced_C: np.ndarray, own_O: np.ndarray, traced_O: np.ndarray) -> np.ndarray | None:
    """The own character that each character comes from, or -1; None where the renderings differ by more than tracers."""
    if len(codes_C) != len(traced_C):
        return None
    numbers = traced_C - FIRST_TRACER
    is_tracer = (numbers >= 0) & (numbers < len(own_O))
    is_tracer[is_tracer] = traced_O[numbers[is_tracer]]
    if (codes_C != traced_C)[~is_tracer].any():
        return None
    sources_C = np.where(is_tracer, numbers, -1)
    places = np.flatnonzero(is_tracer)
    changed = places[own_O[numbers[places]] != codes_C[places]]
    # A template may write a text in other cases; anything else would be a character that only seems to come from there.
    if any(chr(codes_C[i]).casefold() != chr(own_O[numbers[i]]).casefold() for i in changed):
        return None
    return sources_C


def compact(codes_C: np.ndarray) -> str:
    """A text without its white space."""
    return text_of(codes_C[~is_space(codes_C)])
