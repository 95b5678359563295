"""Run the teacher on a few samples, for the tensors that a logit codec keeps once per cache.

Shapes: A answers, M calibration answers, D teacher width, N vocabulary.
"""

from collections.abc import Iterable

import torch

from alignkd.capture.attention import capture
from alignkd.errors import DataError
from alignkd.inputs.batch import Batch
from alignkd.models.vlm import Vlm
from alignkd.pipeline.runtime.out_of_memory import is_out_of_memory
from alignkd.pipeline.stage_one.finite import finite_rows
from alignkd.targets.logits import Calibration

CALIBRATION_SAMPLES = 256
CALIBRATION_ANSWERS = 16_384
"""Answer tokens after which no further sample is read."""
CALIBRATION_POSITIONS = 4096
"""Positions of a batch: few enough for any device that holds the teacher."""

_LOGITS_AT_ONCE = 2**25
"""Logits in memory at a time."""


class NotFiniteError(DataError):
    """Whatever the teacher is given, its numbers are NaN or infinity."""


@torch.inference_mode()
def calibrate(teacher: Vlm, batches: Iterable[Batch], vocabulary: int | None = None) -> Calibration:
    """Hidden states and mean distribution of the teacher over batches, until there are :data:`CALIBRATION_ANSWERS`.

    Batches that run out of memory are skipped, and so are samples with hidden states that are not finite.

    ``vocabulary``: see :class:`alignkd.targets.logits.LogitSettings`.

    Raises:
        NotFiniteError: no answer of any sample is finite.
    """
    head = teacher.head
    head_ND, bias_N = head.weight.detach()[:vocabulary], None if head.bias is None else head.bias.detach()[:vocabulary]
    hidden, count, left_out = [torch.zeros(0, teacher.hidden_size, device=teacher.device)], 0, 0
    sums_N = torch.zeros(len(head_ND), device=teacher.device)
    for batch in batches:
        try:
            hidden_AD = capture(teacher, batch.to(teacher.device), attention=False).hidden_AD
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            continue
        tried, hidden_AD = len(hidden_AD), _of_finite_samples(hidden_AD, batch.answer_samples_A.to(hidden_AD.device))
        for part_AD in torch.split(hidden_AD, answers_at_once(teacher)):
            probabilities_AN = head(part_AD)[:, :vocabulary].float().softmax(dim=1)
            finite_A = probabilities_AN.sum(dim=1).isfinite()
            if not finite_A.all():
                part_AD, probabilities_AN = part_AD[finite_A], probabilities_AN[finite_A]
            sums_N += probabilities_AN.sum(dim=0)
            hidden.append(part_AD.float())
            count += len(part_AD)
            tried -= len(part_AD)
        left_out += tried
        if count >= CALIBRATION_ANSWERS:
            break
    if not count and left_out:
        raise NotFiniteError(f"the teacher's pass gives NaN or infinity at every one of the {left_out:,} answer tokens tried")
    if not count:  # no sample has an answer, so any order of tokens will do
        hidden, sums_N, count = [hidden[0].new_zeros(1, teacher.hidden_size)], torch.ones_like(sums_N), len(sums_N)
    return Calibration(torch.cat(hidden), head_ND, bias_N, sums_N / count)


def _of_finite_samples(hidden_AD: torch.Tensor, owners_A: torch.Tensor) -> torch.Tensor:
    """The hidden states of samples that are finite as a whole."""
    finite_A = finite_rows(hidden_AD)
    return hidden_AD if finite_A.all() else hidden_AD[~torch.isin(owners_A, owners_A[~finite_A])]


def answers_at_once(teacher: Vlm) -> int:
    """Answers whose logits may be in memory at a time."""
    return max(1, _LOGITS_AT_ONCE // teacher.vocabulary)
