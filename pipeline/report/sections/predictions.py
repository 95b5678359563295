"""Sample predictions with their images: right ones and wrong ones, and of several runs those on which they differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkd.errors import DataError
from alignkd.pipeline.config.report import ReportConfig
from alignkd.pipeline.report.page import (
    Html,
    Text,
    card,
    heading,
    joined,
    missing,
    panels,
    paragraph,
    section,
    small,
    table,
    thumbnail,
)
from alignkd.pipeline.report.runs.answers import Answer, AnswerFile, find_answers, picture_or_reason
from alignkd.pipeline.report.runs.run import Run
from alignkd.pipeline.report.words import short

TITLE = "Sample predictions"
FOLDERS = ("evaluation", "evaluate", "test")
"""Where answers lie in a run's folder, if nobody says where: as a run's next command, the README and the demo have them."""

Named = tuple[str, AnswerFile]
"""A run's name, and answers of its student."""


def predictions_section(runs: Sequence[Run], config: ReportConfig) -> tuple[Html, dict[str, Any]]:
    """Scores, and a card for each question that is shown.

    Raises:
        DataError: a folder of ``--predictions`` holds none, or they are damaged.
    """
    by_file, notes = dict[str, list[Named]](), list[Text]()
    for place, run in enumerate(runs):
        given = config.predictions[place] if place < len(config.predictions) else None
        before = f"{run.name}: " if len(runs) > 1 else ""
        try:
            folder = Path(given) if given else next((f for f in _usual(run) if f.is_dir()), None)
            found = find_answers(folder, config.images, run.setting("images")) if folder else []
        except DataError as error:
            if given:
                raise
            found, before = [], f"{before}{short(error)}. "
        for answers in found:
            by_file.setdefault(answers.name, []).append((run.name, answers))
        if not found:
            advice = "alignkd evaluate or alignkd benchmark run makes some, and --predictions DIR shows them"
            notes.append(missing(f"{before}no predictions: {advice}"))
    return section(TITLE, _scores(by_file, runs), *_all_cards(by_file, config.shown_answers, len(runs) > 1), *notes), _figures(
        by_file
    )


def _usual(run: Run) -> list[Path]:
    return [run.folder / name for name in FOLDERS]


def _scores(by_file: dict[str, list[Named]], runs: Sequence[Run]) -> Html:
    if not by_file:
        return Html()
    rows = []
    for name, found in by_file.items():
        of_run = dict(found)
        rows.append([name, *(_score_words(of_run.get(run.name)) for run in runs)])
    return table(["", *(run.name if len(runs) > 1 else "score" for run in runs)], rows)


def _score_words(answers: AnswerFile | None) -> str:
    if answers is None:
        return "–"
    return f"{answers.summary or 'not scored yet'}; {len(answers.answers):,} answers"


def _all_cards(by_file: dict[str, list[Named]], count: int, named: bool) -> list[Html]:
    each = -(-count // len(by_file)) if by_file else 0
    parts = []
    for name, found in by_file.items():
        cards = panels(_card(key_answers, found, named) for key_answers in _choose(found, each))
        parts.append(joined([heading(name, 3) if len(by_file) > 1 else "", cards, small(_caption(found))]))
    return parts if count else []


def _caption(found: Sequence[Named]) -> str:
    differ = "questions on which the runs differ first, then " if len(found) > 1 else ""
    return f"Chosen evenly over the file: {differ}as many wrong as right answers, where there are."


def _choose(found: Sequence[Named], count: int) -> list[list[Answer | None]]:
    """For each question shown the answer of each run, in the order of the first file."""
    by_key = [{answer.key: answer for answer in answers.answers} for _, answers in found]
    common = [key for key in by_key[0] if all(key in others for others in by_key)] or list(by_key[0])
    scores = {key: [answers[key].score for answers in by_key if key in answers] for key in common}
    differing = [key for key in common if len(set(scores[key])) > 1]
    alike = [key for key in common if len(set(scores[key])) == 1]
    wrong = [key for key in alike if (scores[key][0] or 0.0) < 0.5]
    right = [key for key in alike if (scores[key][0] or 0.0) >= 0.5]
    chosen = _spread(differing, count // 2 if alike else count)
    left = count - len(chosen)
    few_right = _spread(right, max(left // 2, left - len(wrong)))
    chosen += few_right + _spread(wrong, left - len(few_right))
    places = {key: place for place, key in enumerate(common)}
    return [[answers.get(key) for answers in by_key] for key in sorted(chosen, key=places.__getitem__)]


def _spread(keys: Sequence[tuple[str, ...]], count: int) -> list[tuple[str, ...]]:
    if count <= 0:
        return []
    step = max(len(keys) / count, 1.0)
    return [keys[int(place * step)] for place in range(min(count, len(keys)))]


def _card(answers: Sequence[Answer | None], found: Sequence[Named], named: bool) -> Html:
    asked = next(answer for answer in answers if answer is not None)
    parts: list[Text] = [_pictures(asked, found[0][1])]
    parts.append(paragraph(joined([Html("<b>"), short(_without_tags(asked.question)), Html("</b>")])))
    parts.append(paragraph(f"expected: {short(asked.expected, 200)}"))
    for (name, _), answer in zip(found, answers, strict=True):
        who = name if named else "answered"
        parts.append(paragraph("–" if answer is None else f"{who}: {short(answer.prediction, 200)} ({_worth(answer)})"))
    return card(*parts, small(short(asked.id, 80)))


def _without_tags(question: str) -> str:
    return question.replace("<image>", "").strip()


def _worth(answer: Answer) -> str:
    if answer.score is None:
        return "not counted"
    return "right" if answer.score >= 1 else "wrong" if answer.score <= 0 else f"worth {answer.score:.2f}"


def _pictures(asked: Answer, answers: AnswerFile) -> Html:
    if not asked.images:
        return small("no image")
    shown = picture_or_reason(answers.read_picture, asked.images[0])
    more = small(f"and {len(asked.images) - 1} more images") if len(asked.images) > 1 else ""
    if isinstance(shown, str):
        return joined([missing(f"no picture: {short(shown, 200)}"), more])
    return joined([thumbnail(shown, f"image of {short(asked.id, 80)}"), more])


def _figures(by_file: dict[str, list[Named]]) -> dict[str, Any]:
    return {
        name: {run: {"answers": len(answers.answers), "score": answers.summary} for run, answers in found}
        for name, found in by_file.items()
    }
