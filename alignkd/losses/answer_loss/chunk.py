"""The terms of a chunk of answers and, in place of their logits, the gradient.

1. Where the teacher is known token by token, compare both distributions over the vocabulary in one pass.
2. Otherwise take the known tokens out of the row, which leaves the tail; compare known tokens and tail, which is little work;
   then fill the row: the tail's softmax, scaled, and the known tokens one by one.

Shapes: C answers of a chunk, N vocabulary, X known tokens, or known tokens and the tail.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from alignkd.losses.answer_loss.forms import FORMS, Sides
from alignkd.losses.answer_loss.rows import DenseTeacher, Labels, Normaliser, Rows, Softmax
from alignkd.losses.dtypes import at_least_float32
from alignkd.targets.logits.answers import Draws, TeacherAnswers

SUPERVISED = "supervised"


@dataclass(frozen=True)
class Terms:
    """The terms, the weight of each in the gradient, and the temperature of the divergences."""

    weights: Mapping[str, float]
    temperature: float

    @property
    def divergences(self) -> dict[str, float]:
        """The weights of all terms but the supervised one."""
        return {name: weight for name, weight in self.weights.items() if name != SUPERVISED}

    @property
    def supervised(self) -> float:
        """Weight of the supervised term in the gradient, 0 where it is absent."""
        return self.weights.get(SUPERVISED, 0.0)


def chunk_terms_(
    rows: Rows,
    logits_CN: torch.Tensor,
    answer_ids_C: torch.Tensor,
    teacher: TeacherAnswers | None,
    terms: Terms,
    gradient: bool,
) -> dict[str, torch.Tensor]:
    """Each term ``[C]``. With ``gradient``, ``logits_CN`` become the weighted gradient; otherwise their values are lost."""
    label_C = at_least_float32(logits_CN.gather(1, answer_ids_C[:, None]))[:, 0]
    labels = Labels(answer_ids_C, terms.supervised)
    if teacher is None:
        none_CX = answer_ids_C.new_empty(len(answer_ids_C), 0)
        teacher = TeacherAnswers(none_CX, none_CX.to(label_C.dtype), torch.zeros_like(label_C))
    if teacher.tail_logits_AN is not None:
        return _dense_(rows, logits_CN, label_C, labels, teacher, terms, gradient)
    return _sparse_(rows, logits_CN, label_C, labels, teacher, terms, gradient)


def _dense_(
    rows: Rows,
    logits_CN: torch.Tensor,
    label_C: torch.Tensor,
    labels: Labels,
    teacher: TeacherAnswers,
    terms: Terms,
    gradient: bool,
) -> dict[str, torch.Tensor]:
    t = terms.temperature
    student = Softmax(torch.ones_like(label_C), rows.normaliser(logits_CN, t), t)
    found: dict[str, torch.Tensor] = {}
    supervised = None
    if SUPERVISED in terms.weights:
        whole = student.normaliser if t == 1 else rows.normaliser(logits_CN, 1.0)
        found[SUPERVISED] = (whole.top_C - label_C) + whole.log_C
        if terms.supervised:
            supervised = Softmax(torch.full_like(label_C, terms.supervised), whole, 1.0), labels
    divergences = terms.divergences
    losses_TC = rows.compare_(logits_CN, dense_teacher(rows, teacher, t), student, divergences, supervised, gradient)
    return found | dict(zip(divergences, losses_TC.unbind(), strict=True))


def dense_teacher(rows: Rows, teacher: TeacherAnswers, temperature: float) -> DenseTeacher:
    """Tail and known tokens in one row; overwrites the tail's logits."""
    logits_CN = teacher.tail_logits_AN
    assert logits_CN is not None
    logits_CN.scatter_(1, teacher.ids_AX, -torch.inf)
    tail = rows.normaliser(logits_CN, temperature)
    whole = Normaliser(tail.top_C, _finite(tail.log_C) - teacher.tail_A)
    known_CX = (teacher.logprobs_AX + (whole.top_C + whole.log_C)[:, None]) * temperature
    return DenseTeacher(logits_CN.scatter_(1, teacher.ids_AX, known_CX.to(logits_CN.dtype)), whole)


def _finite(log_C: torch.Tensor) -> torch.Tensor:
    """Any finite number will do where every token of a row is known, which leaves no tail."""
    return torch.where(log_C == -torch.inf, 0.0, log_C)


@dataclass(frozen=True)
class _Student:
    """The student at one temperature: log-probabilities of known tokens and tail, normalisers of the row and of the tail."""

    logprobs_CX: torch.Tensor
    tail_C: torch.Tensor
    whole: Normaliser
    tail: Normaliser


def _sparse_(
    rows: Rows,
    logits_CN: torch.Tensor,
    label_C: torch.Tensor,
    labels: Labels,
    teacher: TeacherAnswers,
    terms: Terms,
    gradient: bool,
) -> dict[str, torch.Tensor]:
    ids_CX, t = teacher.ids_AX, terms.temperature
    repeats_CX = torch.zeros_like(ids_CX, dtype=torch.bool) if teacher.draws is None else teacher.draws.repeats_AX
    known_CX = at_least_float32(logits_CN.gather(1, ids_CX))
    logits_CN.scatter_(1, ids_CX, -torch.inf)
    wanted = {*([t] if terms.divergences else []), *([1.0] if SUPERVISED in terms.weights else [])}
    students = {at: _student(rows, logits_CN, known_CX, repeats_CX, at) for at in sorted(wanted)}
    found: dict[str, torch.Tensor] = {}
    # What the row becomes: the known tokens, and at each temperature a multiple of the tail's softmax.
    filled_CX, scales = torch.zeros_like(known_CX), {at: torch.zeros_like(label_C) for at in students}
    if terms.divergences:
        found, gradient_CX, tail_gradient_C = _divergences(students[t], teacher, repeats_CX, logits_CN.shape[1], terms)
        filled_CX, scales[t] = filled_CX + gradient_CX, scales[t] + tail_gradient_C
    if SUPERVISED in terms.weights:
        student = students[1.0]
        found[SUPERVISED] = (student.whole.top_C - label_C) + student.whole.log_C
        taken_CX = (ids_CX == labels.ids_C[:, None]).to(known_CX.dtype)
        gradient_CX = (student.logprobs_CX.exp() - taken_CX).masked_fill(repeats_CX, 0.0)
        if terms.supervised:
            filled_CX = filled_CX + terms.supervised * gradient_CX
            scales[1.0] = scales[1.0] + terms.supervised * student.tail_C.exp()
    if gradient:
        parts = [Softmax(scales[at], student.tail, at) for at, student in students.items()]
        rows.mix_(logits_CN, parts, labels if terms.supervised else None)
        logits_CN.scatter_add_(1, ids_CX, filled_CX.to(logits_CN.dtype))
    return found


def _student(rows: Rows, rest_CN: torch.Tensor, known_CX: torch.Tensor, repeats_CX: torch.Tensor, t: float) -> _Student:
    scaled_CX, tail = known_CX / t, rows.normaliser(rest_CN, t)
    first_CX = scaled_CX.masked_fill(repeats_CX, -torch.inf)
    tail_top_C = tail.top_C.masked_fill(tail.log_C == -torch.inf, -torch.inf)
    top_C = torch.cat([first_CX, tail_top_C[:, None]], dim=1).amax(dim=1)
    tail_C = (tail.top_C - top_C) + tail.log_C
    mass_C = tail_C.exp() + (first_CX - top_C[:, None]).exp().sum(dim=1)
    whole = Normaliser(top_C, mass_C.log())
    return _Student(whole.logprobs(scaled_CX), tail_C - whole.log_C, whole, Normaliser(tail.top_C, _finite(tail.log_C)))


def _divergences(
    student: _Student, teacher: TeacherAnswers, repeats_CX: torch.Tensor, vocabulary: int, terms: Terms
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Losses, and the gradient at the known tokens and in all of the tail."""
    student_CX = torch.cat([student.logprobs_CX, student.tail_C[:, None]], dim=1)
    teacher_CX = torch.cat([teacher.logprobs_AX, teacher.tail_A[:, None]], dim=1).to(student_CX.dtype)
    if teacher.ids_AX.shape[1] == vocabulary:
        teacher_CX[:, -1] = -torch.inf
    mass_CX = student_CX.exp()
    mass_CX[:, :-1].masked_fill_(repeats_CX, 0.0)
    student_CX = student_CX.masked_fill(teacher_CX == -torch.inf, -torch.inf)
    sides = Sides(student_CX, teacher_CX)
    found, gradient_CX = {}, torch.zeros_like(mass_CX)
    for name, weight in terms.divergences.items():
        if name == "forward_kl" and teacher.draws is not None:
            found[name], slope_CX = _drawn_forward_kl(student, teacher.draws)
        else:
            found[name], slope_CX = FORMS[name](sides)
        if weight:
            gradient_CX += (slope_CX - mass_CX * slope_CX.sum(dim=1, keepdim=True)) * (weight / terms.temperature)
    return found, gradient_CX[:, :-1], gradient_CX[:, -1]


def _drawn_forward_kl(student: _Student, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and slope, as in :mod:`alignkd.losses.answer_loss.forms`; the tail as such has no weight."""
    weights_CX = draws.weights_AX.to(student.logprobs_CX.dtype)
    loss_C = draws.negentropy_A - (weights_CX * student.logprobs_CX).sum(dim=1)
    return loss_C, torch.cat([-weights_CX, torch.zeros_like(loss_C)[:, None]], dim=1)
