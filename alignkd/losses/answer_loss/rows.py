"""The passes over a chunk of logits, in PyTorch: the reference of :mod:`alignkd.losses.answer_loss.triton_kernel`.

The other work on a chunk is small. A pass takes a few rows at a time, so that its temporaries stay small and, on a CPU, in its
cache.

Shapes: C answers of a chunk, N vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from alignkd.losses.answer_loss.forms import FORMS, Sides
from alignkd.losses.dtypes import at_least_float32

_ELEMENTS = 2**19


@dataclass(frozen=True)
class Normaliser:
    """The log-sum-exp of each row in two parts, ``top_C + log_C``.

    Log-probabilities near zero then keep their precision, however large the logits are. The top is finite; the log of a row of
    -inf alone is -inf.
    """

    top_C: torch.Tensor
    log_C: torch.Tensor

    def __getitem__(self, rows: slice) -> "Normaliser":
        return Normaliser(self.top_C[rows], self.log_C[rows])

    def logprobs(self, scaled_CX: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of logits that are divided by the temperature already, ``[C, X]``."""
        return (scaled_CX - self.top_C[:, None]).sub_(self.log_C[:, None])


@dataclass(frozen=True)
class Softmax:
    """``scale_C * exp(logits / temperature - log-sum-exp)``."""

    scale_C: torch.Tensor
    normaliser: Normaliser
    temperature: float


@dataclass(frozen=True)
class Labels:
    """In each row, ``weight`` is subtracted from the gradient of the logit ``ids_C``."""

    ids_C: torch.Tensor
    weight: float


@dataclass(frozen=True)
class DenseTeacher:
    """Log-probabilities of the whole vocabulary: those of ``logits_CN`` at the temperature by ``normaliser``."""

    logits_CN: torch.Tensor
    normaliser: Normaliser


class Rows(Protocol):
    """What a backend offers. Logits may be of any float type; everything per row is float32, or float64 for float64."""

    def normaliser(self, logits_CN: torch.Tensor, temperature: float) -> Normaliser:
        """The normaliser of ``logits_CN / temperature``."""
        ...

    def mix_(self, logits_CN: torch.Tensor, parts: Sequence[Softmax], labels: Labels | None) -> None:
        """Replace logits by the sum of one or two softmaxes less the labels' weight; -inf becomes 0, a label's too."""
        ...

    def compare_(
        self,
        logits_CN: torch.Tensor,
        teacher: DenseTeacher,
        student: Softmax,
        weights: Mapping[str, float],
        supervised: tuple[Softmax, Labels] | None,
        gradient: bool,
    ) -> torch.Tensor:
        """The divergences named in ``weights``, ``[names, C]``; with ``gradient``, logits are replaced by theirs.

        ``student`` is at the divergences' temperature. A term of weight 0 does not enter the gradient, nor does
        ``supervised`` where it is None.
        """
        ...


def normaliser(logits_CN: torch.Tensor, temperature: float) -> Normaliser:
    """See :class:`Rows`."""
    tops, logs = [], []
    for rows in _few(logits_CN):
        scaled_RN = _over(at_least_float32(logits_CN[rows]), temperature)
        top_R = scaled_RN.amax(dim=1)
        top_R = torch.where(top_R == -torch.inf, 0.0, top_R)
        tops.append(top_R)
        logs.append((scaled_RN - top_R[:, None]).exp_().sum(dim=1).log())
    return Normaliser(torch.cat(tops), torch.cat(logs))


def mix_(logits_CN: torch.Tensor, parts: Sequence[Softmax], labels: Labels | None) -> None:
    """See :class:`Rows`."""
    for rows in _few(logits_CN):
        found_RN = at_least_float32(logits_CN[rows])
        sum_RN = _scaled(found_RN, parts[0], rows)
        for part in parts[1:]:
            sum_RN += _scaled(found_RN, part, rows)
        if labels is not None:
            ids_R1 = labels.ids_C[rows, None]
            taken_R1 = (found_RN.gather(1, ids_R1) > -torch.inf) * -labels.weight
            sum_RN.scatter_add_(1, ids_R1, taken_R1.to(sum_RN))
        logits_CN[rows] = sum_RN


def compare_(
    logits_CN: torch.Tensor,
    teacher: DenseTeacher,
    student: Softmax,
    weights: Mapping[str, float],
    supervised: tuple[Softmax, Labels] | None,
    gradient: bool,
) -> torch.Tensor:
    """See :class:`Rows`."""
    losses = []
    for rows in _few(logits_CN):
        found_RN, temperature = at_least_float32(logits_CN[rows]), student.temperature
        student_RN = student.normaliser[rows].logprobs(_over(found_RN, temperature))
        teacher_RN = teacher.normaliser[rows].logprobs(_over(teacher.logits_CN[rows].to(found_RN.dtype), temperature))
        sides, changes = Sides(student_RN, teacher_RN), []
        for name, weight in weights.items():
            loss_R, slope_RN = FORMS[name](sides)
            losses.append(loss_R)
            if weight and gradient:
                sums_R1 = slope_RN.sum(dim=1, keepdim=True)
                changes.append(slope_RN.addcmul_(sides.q_CX, sums_R1, value=-1).mul_(weight / temperature))
        if gradient and supervised is not None:
            part, labels = supervised
            ids_R1 = labels.ids_C[rows, None]
            taken_R1 = torch.full_like(ids_R1, -labels.weight, dtype=found_RN.dtype)
            changes.append(_scaled(found_RN, part, rows).scatter_add_(1, ids_R1, taken_R1))
        if gradient:
            logits_CN[rows] = sum(changes[1:], start=changes[0])
    names = len(weights)
    return torch.stack([torch.cat(losses[i::names]) for i in range(names)])


def _scaled(logits_RN: torch.Tensor, part: Softmax, rows: slice) -> torch.Tensor:
    top_R1, log_R1, scale_R1 = (t[rows, None] for t in (part.normaliser.top_C, part.normaliser.log_C, part.scale_C))
    return (_over(logits_RN, part.temperature) - top_R1).exp_().mul_(scale_R1 * (-log_R1).exp())


def _over(logits_RN: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divided by the temperature; unchanged where it is one."""
    return logits_RN if temperature == 1 else logits_RN / temperature


def _few(logits_CN: torch.Tensor) -> Iterator[slice]:
    count, vocabulary = logits_CN.shape
    step = max(1, _ELEMENTS // vocabulary)
    return (slice(start, start + step) for start in range(0, count, step))
