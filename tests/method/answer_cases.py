"""Students and teachers for tests of the fused answer loss, and what autograd makes of the reference divergences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from alignkd.losses.answer_loss import AnswerTerms, answer_terms
from alignkd.targets.logits import LOGIT_CODECS, Calibration, LogitCodec, LogitSettings
from tests.reference.logits import divergence

SETTINGS = {
    "topk": LogitSettings("topk", top_k=4),
    "sampled": LogitSettings("sampled", top_k=3, draws=6),
    "sketch": LogitSettings("sketch", top_k=4, sketch_bytes=8),
    "hidden": LogitSettings("hidden"),
}


@dataclass(frozen=True)
class Case:
    """A student's hidden states and head, and the targets of a teacher."""

    codec: LogitCodec
    values: dict[str, torch.Tensor]
    hidden_AD: torch.Tensor
    head_ND: torch.Tensor
    bias_N: torch.Tensor | None
    labels_A: torch.Tensor

    def leaves(self) -> list[torch.Tensor]:
        """What is trained."""
        given = (self.hidden_AD, self.head_ND, self.bias_N)
        return [t.detach().clone().requires_grad_() for t in given if t is not None]

    def fused(self, leaves, weights, temperature=1.0, divisor=7.0) -> AnswerTerms:
        hidden_AD, head_ND, *bias = leaves
        return answer_terms(
            hidden_AD,
            head_ND,
            self.labels_A,
            weights=weights,
            codec=self.codec,
            values=self.values,
            temperature=temperature,
            divisor=divisor,
            bias_N=bias[0] if bias else None,
        )

    def terms(self, leaves, weights, temperature=1.0) -> dict[str, torch.Tensor]:
        """Each term of each answer, by the reference."""
        logits_AN = functional.linear(*leaves)
        found = {"supervised": functional.cross_entropy(logits_AN.float(), self.labels_A, reduction="none")}
        if logits_AN.dtype == torch.float64:
            found = {"supervised": functional.cross_entropy(logits_AN, self.labels_A, reduction="none")}
        for name in weights:
            if name != "supervised":
                found[name] = divergence(self.codec, name, logits_AN, self.values, temperature)
        return {name: found[name] for name in weights}

    def expected(self, weights, temperature=1.0, divisor=7.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Loss and gradients by autograd."""
        leaves = self.leaves()
        terms = self.terms(leaves, weights, temperature)
        loss = sum(weights[name] * term.sum() for name, term in terms.items()) / divisor
        return loss.detach(), list(torch.autograd.grad(loss, leaves))


def make_case(settings, vocabulary=97, answers=24, width=12, far=1.0, bias=False, dtype=torch.float32, seed=0) -> Case:
    """``far``: how far the student's logits are from the teacher's; at 0 they are the same."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    head_ND, spread_D = normal(vocabulary, width) / width**0.5, torch.linspace(2, -2, width).exp()
    bias_N = normal(vocabulary) if bias else None
    calibration_MD, hidden_AD = normal(200, width) * spread_D, normal(answers, width) * spread_D
    mean_N = functional.linear(calibration_MD, head_ND, bias_N).softmax(1).mean(0)
    kind = LOGIT_CODECS[settings.kind]
    codec = kind(settings, kind.calibrate(settings, Calibration(calibration_MD, head_ND, bias_N, mean_N)))
    labels_A = torch.randint(vocabulary, (answers,), generator=generator)
    uniform_AX = 1 - torch.rand(answers, settings.draws, generator=generator)
    values = codec.encode(hidden_AD, functional.linear(hidden_AD, head_ND, bias_N), labels_A, uniform_AX)
    student_AD = hidden_AD + far * normal(answers, width)
    parts = (student_AD.to(dtype), head_ND.to(dtype), None if bias_N is None else bias_N.to(dtype, copy=True))
    return Case(codec, values, *parts, labels_A)


def assert_near(found, expected, tolerance):
    """Within ``tolerance`` of the largest value of ``expected``, or of 1."""
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1)
    assert error <= tolerance, f"error {error:.1e}"
