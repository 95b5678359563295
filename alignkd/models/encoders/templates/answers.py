"""The characters of each answer in a rendered conversation.

An answer is what the template renders of the assistant's text: from the first to the last character that comes from it. What
the template leaves out of it (an earlier turn's thoughts) is not trained on. What the template's code names and writes itself
(``<think>``) belongs to the answer where the answer's text has it in that place. White space at the answer's ends belongs to it
where the template keeps it; between its characters, it is as the template writes it. A template that writes words of its own
into an answer, moves it, repeats it or leaves it out is refused.

Shapes: C characters of the rendered text, A characters of an answer, K of them that the rendering has.
"""

import numpy as np

from alignkd.inputs.prompts import PromptError
from alignkd.models.encoders.templates.codes import FIRST_TRACER, codes, is_space
from alignkd.models.encoders.templates.tracing import Traced, compact

Range = tuple[int, int]


def answer_range(found: Traced, index: int, turn: int) -> Range:
    """First and last character (exclusive) of a text in the rendering; its sources are completed there.

    ``turn``: its number in the conversation, for messages.

    Raises:
        PromptError: says what the template does with it.
    """
    first, after = found.firsts[index : index + 2]
    traced_A = found.traced_O[first:after]
    places_K = np.flatnonzero((found.sources_C >= first) & (found.sources_C < after))
    if not len(places_K):
        if traced_A.any():
            raise PromptError(f"the chat template leaves out turn {turn}")
        return _without_tracers(found, index, turn)
    _check_inside(found, index, turn, places_K)
    start, before = _edge(found, index, turn, places_K, at_end=False)
    end, behind = _edge(found, index, turn, places_K, at_end=True)
    return start - before, end + behind


def _check_inside(found: Traced, index: int, turn: int, places_K: np.ndarray) -> None:
    """Refuse what is not one stretch of the text; complete the sources between its characters."""
    first = found.firsts[index]
    own_K = found.sources_C[places_K] - first
    if (np.diff(own_K) <= 0).any():
        raise PromptError(f"the chat template writes turn {turn} twice, or in another order")
    begin, end = int(places_K[0]), int(places_K[-1]) + 1
    if (found.sources_C[begin:end] >= 0).sum() != len(places_K):
        raise PromptError(f"the chat template writes another turn into turn {turn}")
    rendered, text = found.text[begin:end], found.texts[index]
    if rendered == text[own_K[0] : own_K[-1] + 1]:
        found.sources_C[begin:end] = first + np.arange(own_K[0], own_K[-1] + 1)
        return
    for gap in np.flatnonzero((np.diff(places_K) > 1) | (np.diff(own_K) > 1)).tolist():
        written = "".join(found.text[places_K[gap] + 1 : places_K[gap + 1]].split())
        if written and written not in "".join(text[own_K[gap] + 1 : own_K[gap + 1]].split()):
            raise PromptError(f"the chat template writes {written[:40]!r} into turn {turn}")


def _edge(found: Traced, index: int, turn: int, places_K: np.ndarray, *, at_end: bool) -> tuple[int, int]:
    """Where an end of the text lies, with what the template's code names there, and how much white space lies beyond it."""
    first, text = found.firsts[index], found.texts[index]
    edge = int(places_K[-1]) + 1 if at_end else int(places_K[0])
    own = int(found.sources_C[places_K[-1 if at_end else 0]]) - first
    beyond = slice(own + 1, len(text)) if at_end else slice(0, own)
    literal = "".join(text[beyond].split())
    left_out = found.traced_O[first : first + len(text)][beyond].any()
    reached = _reach(found, edge, literal, at_end=at_end) if literal and not left_out else None
    if literal and reached is None:  # left out with what it belongs to: white space may be kept that stood beside it
        outer = own + 1 + len(text[beyond]) - len(text[beyond].lstrip()) if at_end else len(text[beyond].rstrip())
        spaces = slice(own + 1, outer) if at_end else slice(outer, own)
    else:
        edge = edge if reached is None else reached
        stripped = len(text.rstrip()) if at_end else len(text) - len(text.lstrip())
        spaces = slice(stripped, len(text)) if at_end else slice(0, stripped)
    if spaces.start >= spaces.stop:
        return edge, 0
    return edge, _kept_space(found, index, turn, edge, text[: spaces.start] + text[spaces.stop :], at_end=at_end)


def _reach(found: Traced, edge: int, literal: str, *, at_end: bool) -> int | None:
    """Where a literal ends that stands at an edge, white space aside; None where it does not stand there."""
    step, wanted = (1, literal) if at_end else (-1, literal[::-1])
    place = edge if at_end else edge - 1
    for character in wanted:
        while 0 <= place < len(found.text) and found.text[place].isspace():
            place += step
        if not 0 <= place < len(found.text) or found.text[place] != character or found.sources_C[place] >= 0:
            return None
        place += step
    return place if at_end else place + 1


def _kept_space(found: Traced, index: int, turn: int, edge: int, without_spaces: str, *, at_end: bool) -> int:
    """How many white-space characters beyond an edge are the text's: those that go where the text is without its own."""
    rendered = found.text
    if not (rendered[edge : edge + 1] if at_end else rendered[max(edge - 1, 0) : edge]).isspace():
        return 0
    without = found.rendered_with(index, without_spaces)
    kept = len(rendered) - len(without)
    start = edge if at_end else edge - kept
    same = rendered[:start] + rendered[start + kept :] == without
    if kept < 0 or not same or not (kept == 0 or rendered[start : start + kept].isspace()):
        raise PromptError(
            f"the chat template treats the white space at the ends of turn {turn} in a way that cannot be followed"
        )
    return kept


def _without_tracers(found: Traced, index: int, turn: int) -> Range:
    """The range of a text of white space, or of what the template's code names alone: where another text would stand."""
    other = found.rendered_with(index, chr(FIRST_TRACER + found.firsts[-1]))
    head, *tails = other.split(chr(FIRST_TRACER + found.firsts[-1]))
    tail = tails[0] if len(tails) == 1 else ""
    start, end = len(head), len(found.text) - len(tail)
    fits = len(tails) == 1 and start <= end and found.text.startswith(head) and found.text.endswith(tail)
    middle = codes(found.text[start:end]) if fits else codes("")
    if not fits or compact(middle) != compact(codes(found.texts[index])):
        raise PromptError(f"the chat template writes turn {turn}, an answer without words, in a way that cannot be followed")
    if not is_space(middle).all():
        found.sources_C[start:end] = np.where(is_space(middle), -1, found.firsts[index])
    return start, end
