"""The part of the page with questions on which two models differ."""

from collections.abc import Sequence

from alignkd.pipeline.report.benchmarks.differing import Differing, Pictures
from alignkd.pipeline.report.benchmarks.out_folders import Line, Result
from alignkd.pipeline.report.page import Html, Text, card, details, heading, missing, panels, section, shown, small

_LONGEST = 400
"""Characters of a text that are shown."""


def differing_section(found: Sequence[Differing]) -> Html:
    """For each pair of models and each benchmark: counts in both directions, and some of the questions."""
    pictures = Pictures()
    parts: list[Text] = []
    for number, one in enumerate(found):
        if number == 0 or (found[number - 1].first, found[number - 1].second) != (one.first, one.second):
            parts.append(heading(f"{one.first} and {one.second}", 3))
        parts.append(_list(one, pictures))
    if not parts:
        return Html("")
    words = "Lists are spread evenly over all such questions. A partial score counts as better than a lower one."
    problems = [missing(f"Some pictures are not shown. {problem}") for problem in pictures.problems.values()]
    return section("Questions on which models differ", small(words), *problems, *parts)


def _list(one: Differing, pictures: Pictures) -> Html:
    if not sum(one.counts):
        return small(f"{one.title}: every shared question is worth the same for both.")
    parts: list[Text] = []
    for name, count, lines in (
        (one.first, one.counts[0], one.first_better),
        (one.second, one.counts[1], one.second_better),
    ):
        shown_of = f"{len(lines):,} of {count:,} are shown" if len(lines) < count else "all are shown" if count else "none"
        parts.append(small(f"{name} is better on {count:,}: {shown_of}."))
        parts.append(panels([_question(one, *pair, pictures) for pair in lines]))
    first, second = one.counts
    return details(f"{one.title}: {one.first} better on {first:,}, {one.second} better on {second:,}", *parts)


def _question(one: Differing, first: Line, second: Line, pictures: Pictures) -> Html:
    picture = _picture(one.result, first, pictures)
    answers = list(dict.fromkeys(first.answers))
    rows = [
        Html(f"<p class='said'><strong>{shown(_short(_asked(first.question)))}</strong></p>"),
        Html(f"<p>right: {shown(_short(', '.join(answers)))}</p>"),
        _said(one.first, first),
        _said(one.second, second),
        Html(f"<p class='legend'>{shown(_short(str(first.id)))} {shown(_short(first.category))}</p>"),
    ]
    return card(Html(f"<div class='difference'><div>{picture}</div><div>{''.join(rows)}</div></div>"))


def _said(name: str, line: Line) -> Html:
    said = "no answer" if line.prediction is None else f"“{_short(line.prediction)}”"
    read = f", read as {_short(line.parsed)}" if line.prediction is not None and line.parsed != line.prediction else ""
    return Html(f"<p>{shown(name)} ({line.score:.3g}): {shown(said)}{shown(read)}</p>")


def _picture(result: Result, line: Line, pictures: Pictures) -> Html:
    if not line.images:
        return Html("<div class='none'>no picture</div>")
    found = pictures.of(result, line.images[0])
    return found if found is not None else Html("<div class='none'>picture not readable here</div>")


def _asked(question: str) -> str:
    """A question without the line that says how to answer, which all of its benchmark end with."""
    head, _, last = question.rpartition("\n")
    return head if last.startswith("Answer ") else question


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
