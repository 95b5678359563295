"""The terms of all answers from their last hidden states: a chunk of logits at a time, gradient included.

The gradient is computed in the forward pass, while a chunk's logits exist: the matrix products are those of plain
cross-entropy, nothing is computed twice, and no [answers x vocabulary] tensor exists. Backward only scales the result.
The idea is that of Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989), here with divergences from a teacher.

1. A chunk of rows: ``logits = hidden @ head.T``, in the dtype of autocast.
2. :mod:`alignkd.losses.answer_loss.chunk` turns them into losses and, in place, their gradient, at the scale of a sum
   over answers: in float16 a mean over thousands would vanish.
3. ``hidden``'s gradient is ``gradient @ head``; ``head``'s grows by ``gradient.T @ hidden``.
4. Backward multiplies both by the gradient of the loss and the scale of the mean.

Where divergences have a weight for each token, the gradient of the supervised term, which has none, is computed apart from the
same logits.

Shapes: A answers, C answers of a chunk, D width, N vocabulary, T terms.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.utils.generic import maybe_autocast

from alignkd.losses.answer_loss import rows as torch_rows
from alignkd.losses.answer_loss.chunk import SUPERVISED, Terms, chunk_terms_
from alignkd.losses.answer_loss.forms import FORMS
from alignkd.losses.answer_loss.rows import Rows
from alignkd.losses.dtypes import at_least_float32
from alignkd.targets.logits import LogitCodec
from alignkd.targets.logits.answers import TeacherAnswers, TeacherReader

_SCRATCH_BYTES = 2**26
"""Size of a chunk's logits, with the teacher's where they are dense."""
_HEAD_ROWS = 4096
"""Rows of the head whose gradient is converted to float32 at a time."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class AnswerTerms:
    """``loss``: differentiable, the weighted sum of all terms, each a sum over answers over the divisor.

    ``sums``: of each term its sum over answers without the term's weight, but with those of tokens; without gradient.
    ``finite_A``: every term of the answer is finite, those of weight 0 too. ``losses_TA``: each term of each answer, without
    any weight; None where parts were put together. Sums are float32; float64 for float64 hidden states.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
    finite_A: torch.Tensor
    losses_TA: torch.Tensor | None = None


def _outside_graphs(function: _Function) -> _Function:
    return cast(_Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


@_outside_graphs
def answer_terms(
    hidden_AD: torch.Tensor,
    head_ND: torch.Tensor,
    answer_ids_A: torch.Tensor,
    *,
    weights: Mapping[str, float],
    codec: LogitCodec | None,
    values: Mapping[str, torch.Tensor],
    temperature: float,
    divisor: float | torch.Tensor,
    bias_N: torch.Tensor | None = None,
    token_weights_A: torch.Tensor | None = None,
) -> AnswerTerms:
    """The terms named in ``weights`` (``supervised`` and divergences) of logits ``hidden @ head.T + bias``.

    Gradients reach ``hidden_AD``, ``head_ND`` and ``bias_N``, where they require one. A term of weight 0 is reported
    and touches neither loss nor gradient, even where it overflows. ``values`` are the codec's targets, first axis A.
    ``temperature`` is that of the divergences, and ``token_weights_A`` the weight of each answer in them (None: 1 for all).
    There may be no answers at all. Is not compiled by ``torch.compile``.

    Raises:
        RuntimeError: in a second backward pass: the first one hands the gradients over, so that no copy of the head's is kept.
    """
    names = [name for name in weights if name != SUPERVISED]
    assert set(names) <= FORMS.keys(), f"terms {names}"
    assert codec is not None or not names, "a divergence needs a codec"
    assert len(head_ND), "the output head has no rows here: a sharded one must be gathered first"
    largest = max((abs(weight) for weight in weights.values()), default=0.0) or 1.0
    work = _Work(
        answer_ids_A=answer_ids_A,
        teacher=codec.teacher(values) if codec is not None and names else None,
        dense_teacher=codec is not None and bool(names) and codec.whole_vocabulary,
        # Scaled so that the largest is 1, where float16 is at its best.
        terms=Terms({name: weight / largest for name, weight in weights.items()}, float(temperature)),
        scale=largest / divisor,
        gradient=torch.is_grad_enabled() and any(weights.values()),
        token_weights_A=token_weights_A if names else None,
    )
    loss, losses_TA = _FusedAnswerLoss.apply(hidden_AD, head_ND, bias_N, work)  # type: ignore[no-untyped-call]
    sums = {name: work.total(name, loss_A) for name, loss_A in zip(weights, losses_TA, strict=True)}
    return AnswerTerms(loss, sums, losses_TA.isfinite().all(dim=0), losses_TA)


@dataclass(frozen=True)
class _Work:
    """The inputs that are not differentiated. The weights of ``terms`` times ``scale`` are those of the loss."""

    answer_ids_A: torch.Tensor
    teacher: TeacherReader | None
    dense_teacher: bool
    terms: Terms
    scale: float | torch.Tensor
    gradient: bool
    token_weights_A: torch.Tensor | None = None

    def total(self, name: str, loss_A: torch.Tensor) -> torch.Tensor:
        """The sum of a term over answers, by the weights of tokens where the term has such."""
        if self.token_weights_A is None or name == SUPERVISED:
            return loss_A.sum()
        return (loss_A * self.token_weights_A.to(loss_A.dtype)).sum()

    def chunks(self, vocabulary: int, itemsize: int) -> Iterator[slice]:
        """Answers in chunks of similar size, whose logits are no larger than the scratch."""
        answers = len(self.answer_ids_A)
        twice = 1 + (self.token_weights_A is not None)
        at_most = max(1, _SCRATCH_BYTES // (vocabulary * (itemsize * twice + 4 * self.dense_teacher)))
        size = -(-answers // max(1, -(-answers // at_most)))
        return (slice(start, min(start + size, answers)) for start in range(0, answers, size or 1))


@dataclass(frozen=True)
class _Head:
    """The output head in the dtype of its products, and the gradients to which its chunks add.

    Gradients are those of a sum over answers, in the dtypes of the parameters; None where none is needed.
    """

    hidden_AD: torch.Tensor
    head_ND: torch.Tensor
    bias_N: torch.Tensor | None
    hidden_gradient_AD: torch.Tensor | None
    head_gradient_ND: torch.Tensor | None
    bias_gradient_N: torch.Tensor | None

    @property
    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        """In the order of the parameters."""
        return self.hidden_gradient_AD, self.head_gradient_ND, self.bias_gradient_N

    def losses(self, work: _Work) -> torch.Tensor:
        """Each term of each answer, ``[T, A]``; adds to the gradients."""
        chunks = work.chunks(len(self.head_ND), self.head_ND.element_size())
        found = [self._chunk(part, work) for part in chunks]
        if not found:
            return at_least_float32(self.hidden_AD.new_zeros(len(work.terms.weights), 0))
        return torch.cat(found, dim=1)

    def _chunk(self, part: slice, work: _Work) -> torch.Tensor:
        logits_CN = functional.linear(self.hidden_AD[part], self.head_ND, self.bias_N)
        teacher = None if work.teacher is None else work.teacher(part)
        gradient = work.gradient and any(wanted is not None for wanted in self.gradients)
        ids_C = work.answer_ids_A[part]
        if work.token_weights_A is None:
            losses = chunk_terms_(rows_for(logits_CN), logits_CN, ids_C, teacher, work.terms, gradient)
        else:
            losses = _weighted_chunk_(logits_CN, ids_C, teacher, work.terms, work.token_weights_A[part], gradient)
        if gradient:
            self._add_gradients(part, logits_CN)
        return torch.stack([losses[name] for name in work.terms.weights])

    def _add_gradients(self, part: slice, change_CN: torch.Tensor) -> None:
        if self.hidden_gradient_AD is not None:
            self.hidden_gradient_AD[part] = change_CN @ self.head_ND
        if self.bias_gradient_N is not None:
            self.bias_gradient_N.add_(change_CN.sum(dim=0, dtype=at_least_float32(change_CN[:0]).dtype))
        if self.head_gradient_ND is not None and self.head_gradient_ND.dtype == change_CN.dtype:
            self.head_gradient_ND.addmm_(change_CN.T, self.hidden_AD[part])
        elif self.head_gradient_ND is not None:
            for rows in _some_rows(self.head_gradient_ND):
                self.head_gradient_ND[rows].add_(change_CN[:, rows].T @ self.hidden_AD[part])


def _weighted_chunk_(
    logits_CN: torch.Tensor,
    ids_C: torch.Tensor,
    teacher: TeacherAnswers | None,
    terms: Terms,
    weights_C: torch.Tensor,
    gradient: bool,
) -> dict[str, torch.Tensor]:
    """As :func:`chunk_terms_`, with the gradient of each row's divergences times its weight; losses are without it."""
    supervised = {name: weight for name, weight in terms.weights.items() if name == SUPERVISED}
    rows, own_CN = rows_for(logits_CN), logits_CN.clone() if supervised else None
    losses = chunk_terms_(rows, logits_CN, ids_C, teacher, Terms(terms.divergences, terms.temperature), gradient)
    if gradient:
        logits_CN.mul_(weights_C[:, None])
    if own_CN is not None:
        losses |= chunk_terms_(rows, own_CN, ids_C, None, Terms(supervised, terms.temperature), gradient)
        if gradient and terms.supervised:
            logits_CN.add_(own_CN)
    return losses


class _FusedAnswerLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_AD: torch.Tensor, head_ND: torch.Tensor, bias_N: torch.Tensor | None, work: _Work
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, dtype = (hidden_AD, head_ND, bias_N), _product_dtype(hidden_AD)
        asked = [work.gradient and needed for needed in ctx.needs_input_grad[:3]]
        gradients = [torch.zeros_like(x) if x is not None and a else None for x, a in zip(inputs, asked, strict=True)]
        with maybe_autocast(hidden_AD.device.type, enabled=False):
            bias = None if bias_N is None else bias_N.to(dtype)
            losses_TA = _Head(hidden_AD.to(dtype), head_ND.to(dtype), bias, *gradients).losses(work)
        weighted = [
            w * work.total(name, loss_A) for (name, w), loss_A in zip(work.terms.weights.items(), losses_TA, strict=True) if w
        ]
        ctx.gradients, ctx.scale = gradients, work.scale
        ctx.mark_non_differentiable(losses_TA)
        ctx.set_materialize_grads(False)
        return sum(weighted, start=losses_TA.new_zeros(())) * work.scale, losses_TA

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("answer_terms hands its gradients over in the first backward pass: call it again for a second")
        if grad_loss is None:
            return None, None, None, None
        factor = grad_loss * ctx.scale
        for gradient in gradients:
            if gradient is not None:
                _scale_(gradient, factor)
        return (*gradients, None)


def _product_dtype(hidden_AD: torch.Tensor) -> torch.dtype:
    """The dtype that autocast gives a matrix product of these."""
    kind = hidden_AD.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and hidden_AD.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden_AD.dtype


def _scale_(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """In float32: the factor itself may be out of the range of float16."""
    for rows in _some_rows(gradient):
        gradient[rows] = at_least_float32(gradient[rows]).mul_(factor)


def _some_rows(gradient: torch.Tensor) -> Iterator[slice]:
    return (slice(start, start + _HEAD_ROWS) for start in range(0, len(gradient), _HEAD_ROWS))


def rows_for(logits_CN: torch.Tensor) -> Rows:
    """Triton's kernels on a GPU, where Triton is installed; PyTorch elsewhere."""
    if logits_CN.is_cuda and logits_CN.dtype != torch.float64 and (kernels := _triton()) is not None:
        return kernels
    return torch_rows


@cache
def _triton() -> Rows | None:
    try:
        from alignkd.losses.answer_loss import triton_kernel
    except ImportError:
        return None
    return triton_kernel
