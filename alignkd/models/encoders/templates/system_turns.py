"""Whether a chat template shows a system turn: one that leaves it out would train on another prompt than the data says."""

import numpy as np

from alignkd.inputs.prompts import PromptError
from alignkd.models.encoders.templates.codes import FIRST_TRACER
from alignkd.models.encoders.templates.tracing import Traced


def check_shown(found: Traced, index: int, turn: int) -> None:
    """Refuse a rendering that lacks some of a text; ``turn``: its number in the conversation.

    Raises:
        PromptError: says what is left out.
    """
    first, after = found.firsts[index : index + 2]
    traced = np.flatnonzero(found.traced_O[first:after]) + first
    left_out = traced[~np.isin(traced, found.sources_C)]
    if len(traced) and not len(left_out):
        return
    if not len(traced) and _stands_where_another_would(found, index):
        return
    text = found.texts[index]
    said = text if len(left_out) in (0, len(traced)) else text[int(left_out[0]) - first :]
    raise PromptError(f"the chat template leaves out {said.strip()[:40]!r} of turn {turn}, a system turn")


def _stands_where_another_would(found: Traced, index: int) -> bool:
    """Whether a text that the template's code names, so that no tracer marks it, is written where another text would be."""
    other = chr(FIRST_TRACER + found.firsts[-1])
    head, _, tail = found.rendered_with(index, other).partition(other)
    written = found.text.removeprefix(head).removesuffix(tail)
    return found.text == head + written + tail and "".join(written.split()) == "".join(found.texts[index].split())
