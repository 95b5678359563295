"""Run the teacher on a few samples, for the tensors that a logit codec keeps once per cache.

Shapes: A answers, M calibration answers, D teacher width, N vocabulary.
"""

from collections.abc import Iterable

import torch

from alignkd.capture.attention import capture
from alignkd.inputs.batch import Batch
from alignkd.models.vlm import Vlm
from alignkd.pipeline.runtime.out_of_memory import is_out_of_memory
from alignkd.targets.logits import Calibration

CALIBRATION_SAMPLES = 256
CALIBRATION_ANSWERS = 16_384
"""Answer tokens after which no further sample is read."""
CALIBRATION_POSITIONS = 4096
"""Positions of a batch: few enough for any device that holds the teacher."""

_LOGITS_AT_ONCE = 2**25
"""Logits in memory at a time."""


@torch.inference_mode()
def calibrate(teacher: Vlm, batches: Iterable[Batch], vocabulary: int | None = None) -> Calibration:
    """Hidden states and mean distribution of the teacher over batches, until there are :data:`CALIBRATION_ANSWERS`.

    Batches that run out of memory are skipped.

    ``vocabulary``: see :class:`alignkd.targets.logits.LogitSettings`.
    """
    head = teacher.head
    head_ND, bias_N = head.weight.detach()[:vocabulary], None if head.bias is None else head.bias.detach()[:vocabulary]
    hidden, count = [torch.zeros(0, teacher.hidden_size, device=teacher.device)], 0
    sums_N = torch.zeros(len(head_ND), device=teacher.device)
    for batch in batches:
        try:
            hidden_AD = capture(teacher, batch.to(teacher.device), attention=False).hidden_AD
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            continue
        for part_AD in torch.split(hidden_AD, answers_at_once(teacher)):
            sums_N += head(part_AD)[:, :vocabulary].float().softmax(dim=1).sum(dim=0)
        hidden.append(hidden_AD.float())
        count += len(hidden_AD)
        if count >= CALIBRATION_ANSWERS:
            break
    if not count:  # no sample has an answer, so any order of tokens will do
        hidden, sums_N, count = [hidden[0].new_zeros(1, teacher.hidden_size)], torch.ones_like(sums_N), len(sums_N)
    return Calibration(torch.cat(hidden), head_ND, bias_N, sums_N / count)


def answers_at_once(teacher: Vlm) -> int:
    """Answers whose logits may be in memory at a time."""
    return max(1, _LOGITS_AT_ONCE // teacher.vocabulary)
