"""Top-k targets as they are, unrounded, for tests about what is done with them."""

from __future__ import annotations

import torch

from alignkd.capture.attention import capture
from alignkd.objective import TeacherShape
from alignkd.targets.batch_targets import Targets
from alignkd.targets.logits import LogitCodec, LogitSettings
from alignkd.targets.logits.answers import TeacherAnswers
from tests.reference.divergences import DIVERGENCES
from tests.reference.logits import at_temperature, bucketed


def topk_targets(logits_AN, k, temperature=1.0):
    """Ids, log-probabilities, and the log mass of all others."""
    logprobs_AN = at_temperature(logits_AN, temperature)
    logprobs_AK, ids_AK = logprobs_AN.topk(min(k, logits_AN.shape[1]), dim=1)
    return ids_AK, logprobs_AK, logprobs_AN.scatter(1, ids_AK, -torch.inf).logsumexp(dim=1)


def reverse_kl(logits_AN, ids_AK, logprobs_AK, tail_A, temperature=1.0):
    return DIVERGENCES["reverse_kl"](*bucketed(at_temperature(logits_AN, temperature), ids_AK, logprobs_AK, tail_A))


class ExactTopK(LogitCodec):
    """Values ``ids``, ``logprobs`` and ``tail``."""

    kind = "exact"

    def __init__(self):
        super().__init__(LogitSettings("topk"), {})

    @classmethod
    def tensor_names(cls):
        return ()

    @classmethod
    def calibrate(cls, settings, calibration):
        return {}

    @classmethod
    def fields(cls, settings, vocabulary):
        raise AssertionError("never stored")

    def encode(self, hidden_AD, logits_AN, label_ids_A, uniform_AX):
        return dict(zip(("ids", "logprobs", "tail"), topk_targets(logits_AN, self.settings.top_k), strict=True))

    def teacher(self, values):
        return lambda part: TeacherAnswers(*(values[name][part] for name in ("ids", "logprobs", "tail")))


def exact_answers(teacher, hidden_AD, k=20):
    """What :class:`ExactTopK` wants of a teacher's last hidden states."""
    kept = topk_targets(teacher.model.lm_head(hidden_AD), k)
    return dict(zip(("ids", "logprobs", "tail"), kept, strict=True))


def targets_of(teacher, batch, k=20):
    """All that a teacher has to teach about a batch: every layer's attention, its vision tokens, its exact answers, and
    an advantage for those about an image."""
    with torch.no_grad():
        captured = capture(teacher, batch, layers=range(teacher.layers))
        answers = exact_answers(teacher, captured.hidden_AD, k)
        advantage_A = batch.answer_ids_A % 3 * batch.samples_with_image()[batch.answer_samples_A]
        return Targets(captured.attention, captured.vision_BVD, answers, advantage_A.float())


def shape_of(teacher):
    return TeacherShape(teacher.heads, teacher.hidden_size, teacher.layers)
