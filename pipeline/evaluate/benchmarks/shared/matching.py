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


def require_all(about: About, questions: Sequence[Question], matched: Sequence[Answer | None], why: str = "") -> None:
    """Refuse an answer file that leaves a question out; ``why``, if not that the official scorer does.

    Raises:
        DataError: says how many are left out, and which is the first.
    """
    missing = [question for question, answer in zip(questions, matched, strict=True) if answer is None]
    if missing:
        raise DataError(
            f"{len(missing):,} of the {len(questions):,} questions of {about.title} have no answer (the first:"
            f" {missing[0].question_id!r:.80}); {why or 'its official scorer refuses that too'}: answer all of them"
        )


def one_each(about: About, questions: Sequence[Question], answers: Sequence[Answer], why: str) -> list[Answer]:
    """The line with the id of each question, where the scorer takes no other lines and no second ones; ``why``, in words.

    Raises:
        DataError: a line is about another question or answers one again, or a question has no line.
    """
    known = {question.question_id for question in questions}
    if not any(answer.question_id in known for answer in answers):
        raise none_matches(about, questions, answers)
    found: dict[str | int, Answer] = {}
    for answer in answers:
        if answer.question_id not in known:
            raise DataError(
                f"line {answer.line} of the answer file is about {answer.question_id!r:.80}, which is no question of"
                f" {about.title} here; give the answers to its {len(questions):,} questions alone"
            )
        refuse_twice(found.setdefault(answer.question_id, answer), answer)
    matched = [found.get(question.question_id) for question in questions]
    require_all(about, questions, matched, why)
    return [answer for answer in matched if answer is not None]


def refuse_twice(first: Answer, answer: Answer) -> None:
    """Refuse a second line about a question, unless it is the first itself.

    Raises:
        DataError: names both lines.
    """
    if first is not answer:
        raise DataError(
            f"lines {first.line} and {answer.line} of the answer file answer the same question"
            f" ({answer.question_id!r:.80}); leave one of them"
        )


def require_asked(about: About, question: str, answer: Answer) -> None:
    """Refuse a line whose recorded prompt, if there is one, does not hold the question; white space does not matter.

    Raises:
        DataError: names the line: its id is that of another question in another version of the data.
    """
    if answer.prompt.strip() and " ".join(question.split()) not in " ".join(answer.prompt.split()):
        raise DataError(
            f"line {answer.line} of the answer file asks {answer.prompt!r:.120}, but question {answer.question_id!r:.80} of"
            f" {about.title} here is {question!r:.120}; the answers are to another version of the data: get its official files"
        )
