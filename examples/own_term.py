"""A loss term of your own, without a change to alignkd: the angle between the mean vision tokens of student and teacher.

    alignkd distill --plugin examples/own_term.py --set mean_token_angle=0.5 --student STUDENT --cache CACHE \
        --data train.json --images images --out run

It trains with the student, has a line in metrics.jsonl under its name, and is saved in the checkpoints.
"""

import torch
from torch import nn

import alignkd


@alignkd.register_term("mean_token_angle", needs=("vision",), averaged_over="with_image")
class MeanTokenAngle(nn.Module):
    """One value per sample ``[B]``: one minus the cosine of the mean tokens, the student's mapped to the teacher's width."""

    def __init__(self, shapes):
        super().__init__()
        self.map = nn.Linear(shapes.student_width, shapes.teacher.width, bias=False)

    def forward(self, inputs):
        """``inputs``: see alignkd.losses.contract.TermInputs."""
        mask_BV1 = inputs.batch.vision_mask_BV[:, :, None]
        count_B1 = mask_BV1.sum(dim=1).clamp(min=1)
        student_BD = (self.map(inputs.student_vision_BVD) * mask_BV1).sum(dim=1) / count_B1
        teacher_BD = (inputs.targets.vision_BVD * mask_BV1).sum(dim=1) / count_B1
        return 1 - torch.cosine_similarity(student_BD.float(), teacher_BD.float(), dim=1)


@alignkd.register_metric("first_word")
def first_word(prediction, answer):
    """Used as ``alignkd evaluate --plugin examples/own_term.py --metric first_word``."""
    return prediction.split()[:1] == answer.split()[:1]
