"""The passes over a chunk of logits as Triton kernels: one program per row, everything computed in float32.

The functions are those of :class:`alignkd.losses.answer_loss.rows.Rows`, and :mod:`alignkd.losses.answer_loss.rows` is their
reference.

Shapes: C answers of a chunk, N vocabulary.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl

from alignkd.losses.answer_loss import forms
from alignkd.losses.answer_loss.rows import DenseTeacher, Labels, Normaliser, Softmax

_LOWEST = tl.constexpr(-1e30)
_LOG_2 = tl.constexpr(math.log(2))
_NAN = tl.constexpr(tl.PropagateNan.ALL)
_REPORTED, _WEIGHTED = 1, 2


def normaliser(logits_CN: torch.Tensor, temperature: float) -> Normaliser:
    """See :class:`alignkd.losses.answer_loss.rows.Rows`."""
    top_C, log_C = (torch.empty(len(logits_CN), device=logits_CN.device) for _ in range(2))
    grid, shape = _layout(logits_CN)
    with torch.cuda.device_of(logits_CN):
        _normaliser_kernel[grid](logits_CN, logits_CN.stride(0), top_C, log_C, temperature, **shape)
    return Normaliser(top_C, log_C)


def mix_(logits_CN: torch.Tensor, parts: Sequence[Softmax], labels: Labels | None) -> None:
    """See :class:`alignkd.losses.answer_loss.rows.Rows`."""
    one, other = parts[0], parts[-1]
    label_ids_C, label_weight = (one.scale_C, 0.0) if labels is None else (labels.ids_C, labels.weight)
    grid, shape = _layout(logits_CN)
    with torch.cuda.device_of(logits_CN):
        _mix_kernel[grid](
            logits_CN, logits_CN.stride(0), *_softmax(one), *_softmax(other), label_ids_C, label_weight,
            PARTS=len(parts), LABELS=labels is not None, **shape,
        )  # fmt: skip


def compare_(
    logits_CN: torch.Tensor,
    teacher: DenseTeacher,
    student: Softmax,
    weights: Mapping[str, float],
    supervised: tuple[Softmax, Labels] | None,
    gradient: bool,
) -> torch.Tensor:
    """See :class:`alignkd.losses.answer_loss.rows.Rows`."""
    losses_C3 = torch.empty(len(logits_CN), len(forms.FORMS), device=logits_CN.device)
    wanted = {
        name: 0 if name not in weights else _WEIGHTED if gradient and weights[name] else _REPORTED for name in forms.FORMS
    }
    scaled = [weights.get(name, 0.0) / student.temperature for name in forms.FORMS]
    part, labels = supervised if supervised is not None else (student, Labels(student.scale_C, 0.0))
    grid, shape = _layout(logits_CN)
    with torch.cuda.device_of(logits_CN):
        _compare_kernel[grid](
            logits_CN, logits_CN.stride(0), teacher.logits_CN, teacher.logits_CN.stride(0),
            *_softmax(student)[1:], teacher.normaliser.top_C, teacher.normaliser.log_C, losses_C3, *scaled,
            *_softmax(part), labels.ids_C, labels.weight,
            *wanted.values(), GRADIENT=gradient, SUPERVISED=supervised is not None, **shape,
        )  # fmt: skip
    return losses_C3.T[[list(forms.FORMS).index(name) for name in weights]]


def _layout(logits_CN: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
    """One program per row, and the blocks of a row."""
    answers, vocabulary = logits_CN.shape
    assert logits_CN.stride(1) == 1
    return (answers,), {"N": vocabulary, "BLOCK": min(4096, triton.next_power_of_2(vocabulary)), "num_warps": 8}


def _softmax(part: Softmax) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    return part.scale_C, part.normaliser.top_C, part.normaliser.log_C, part.temperature


@triton.jit
def _normaliser_kernel(logits, stride, top_out, log_out, temperature, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lowest = tl.full([], _LOWEST, tl.float32)  # instead of -inf, which would leave NaN where a row begins with it
    top, total = lowest, tl.zeros([], tl.float32)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load(logits + row * stride, columns, N) / temperature
        higher = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), axis=0)
        top = higher
    tl.store(top_out + row, tl.where(top == lowest, 0.0, top))
    tl.store(log_out + row, tl.log(total))


@triton.jit
def _mix_kernel(
    logits, stride,
    scale_1, top_1, log_1, temperature_1,
    scale_2, top_2, log_2, temperature_2,
    label_ids, label_weight,
    N, PARTS: tl.constexpr, LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load(logits, columns, N)
        sum_ = _scaled_softmax(z, row, scale_1, top_1, log_1, temperature_1)
        if PARTS == 2:
            sum_ += _scaled_softmax(z, row, scale_2, top_2, log_2, temperature_2)
        if LABELS:
            sum_ -= tl.where((columns == tl.load(label_ids + row)) & (z > float("-inf")), label_weight, 0.0)
        tl.store(logits + columns, sum_, mask=columns < N)


@triton.jit
def _compare_kernel(
    logits, stride, teacher_logits, teacher_stride,
    top, log, temperature, teacher_top, teacher_log, losses,
    reverse_weight, forward_weight, jensen_weight,
    scale_1, top_1, log_1, temperature_1, label_ids, label_weight,
    REVERSE: tl.constexpr, FORWARD: tl.constexpr, JENSEN: tl.constexpr,
    N, GRADIENT: tl.constexpr, SUPERVISED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    teacher_logits += row * teacher_stride
    top, log = tl.load(top + row), tl.load(log + row)
    teacher_top, teacher_log = tl.load(teacher_top + row), tl.load(teacher_log + row)
    slopes = tl.zeros([], tl.float32)
    reverse, forward, jensen = slopes, slopes, slopes
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        student = _load(logits, columns, N) / temperature - top - log
        teacher = _load(teacher_logits, columns, N) / temperature - teacher_top - teacher_log
        q, a, b, c, slope = _terms(
            student, teacher, reverse_weight, forward_weight, jensen_weight, REVERSE, FORWARD, JENSEN
        )  # fmt: skip
        reverse += tl.sum(a, axis=0)
        forward += tl.sum(b, axis=0)
        jensen += tl.sum(c, axis=0)
        slopes += tl.sum(slope, axis=0)
    tl.store(losses + row * 3, reverse)
    tl.store(losses + row * 3 + 1, forward)
    tl.store(losses + row * 3 + 2, jensen)
    if GRADIENT:
        for start in range(0, N, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = _load(logits, columns, N)
            teacher = _load(teacher_logits, columns, N) / temperature - teacher_top - teacher_log
            q, a, b, c, slope = _terms(
                z / temperature - top - log, teacher, reverse_weight, forward_weight, jensen_weight, REVERSE, FORWARD, JENSEN
            )
            change = slope - q * slopes
            if SUPERVISED:
                change += _scaled_softmax(z, row, scale_1, top_1, log_1, temperature_1)
                change -= tl.where(columns == tl.load(label_ids + row), label_weight, 0.0)
            tl.store(logits + columns, change, mask=columns < N)


@triton.jit
def _terms(
    student, teacher, reverse_weight, forward_weight, jensen_weight,
    REVERSE: tl.constexpr, FORWARD: tl.constexpr, JENSEN: tl.constexpr,
):  # fmt: skip
    """The student's probabilities, each divergence and the weighted slope, as in :mod:`alignkd.losses.answer_loss.forms`."""
    ratio = student - teacher
    q, p = tl.exp(student), tl.exp(teacher)
    slope = tl.zeros_like(q)
    reverse, forward, jensen = slope, slope, slope
    if REVERSE > 0:
        reverse = _times(q, ratio)
    if REVERSE == 2:
        slope += reverse_weight * (reverse + q)
    if FORWARD > 0:
        forward = -_times(p, ratio)
    if FORWARD == 2:
        slope -= forward_weight * p
    if JENSEN > 0:
        half_q = _times(q, _logsigmoid(ratio) + _LOG_2) / 2
        jensen = half_q + _times(p, _logsigmoid(-ratio) + _LOG_2) / 2
        if JENSEN == 2:
            slope += jensen_weight * half_q
    return q, reverse, forward, jensen, slope


@triton.jit
def _times(probability, log):
    return tl.where(probability == 0, 0.0, probability * log)


@triton.jit
def _logsigmoid(x):
    return tl.minimum(x, 0.0, propagate_nan=_NAN) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _scaled_softmax(z, row, scale, top, log, temperature):
    return tl.load(scale + row) * tl.exp(z / temperature - tl.load(top + row) - tl.load(log + row))


@triton.jit
def _load(row_start, columns, N):
    return tl.load(row_start + columns, mask=columns < N, other=float("-inf")).to(tl.float32)
