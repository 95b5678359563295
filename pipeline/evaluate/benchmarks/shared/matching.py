"""Which line of an answer file answers which question, where the id of a question says it all."""

from collections.abc import Sequence

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.contract import About, Answer, Question


def by_id(about: About, questions: Sequence[Question], answers: Sequence[Answer]) -> list[Answer | None]:
    """The last line with the id of each question: ids are equal in text and type, as in LLaVA's and the official scorers.

    Raises:
        DataError: no line answers a question.
    """
    last = {answer.question_id: answer for answer in answers}
    matched = [last.get(question.question_id) for question in questions]
    if any(answer is not None for answer in matched):
        return matched
    raise none_matches(about, questions, answers)


def none_matches(about: About, questions: Sequence[Question], answers: Sequence[Answer]) -> DataError:
    """The error for an answer file without one line about these questions."""
    found, expected = answers[0].question_id, questions[0].question_id
    known = {str(question.question_id) for question in questions}
    if any(type(answer.question_id) is not type(expected) and str(answer.question_id) in known for answer in answers):
        kinds = ("whole numbers", "texts") if isinstance(expected, str) else ("texts", "whole numbers")
        reason = f"its 'question_id's are {kinds[0]} ({found!r:.80}), those of {about.title} are {kinds[1]} ({expected!r:.80})"
    else:
        reason = f"the first line is about {found!r:.80}, the first question of {about.title} is {expected!r:.80}"
    return DataError(f"the answer file answers none of the {len(questions):,} questions: {reason}; give the answers to these")


def require_all(about: About, questions: Sequence[Question], matched: Sequence[Answer | None]) -> None:
    """Refuse an answer file that leaves a question out.

    Raises:
        DataError: says how many are left out, and which is the first.
    """
    missing = [question for question, answer in zip(questions, matched, strict=True) if answer is None]
    if missing:
        raise DataError(
            f"{len(missing):,} of the {len(questions):,} questions of {about.title} have no answer (the first:"
            f" {missing[0].question_id!r:.80}); its official scorer refuses that too: answer all of them"
        )
