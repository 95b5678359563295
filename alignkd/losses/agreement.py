"""Whether the student's likeliest token is the teacher's: what greedy decoding of the two would say, one token at a time.

Shapes: A answers, P of them with a target, D width, N vocabulary.
"""

import torch

from alignkd.losses.contract import TermInputs
from alignkd.targets.logits.answers import TeacherAnswers

_SCRATCH_BYTES = 2**26
"""Size of a chunk's logits."""


@torch.no_grad()
def agreement(inputs: TermInputs, head_ND: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """How many answers agree, and how many were compared: ``[2]``, float32, on the device of the hidden states.

    Answers without a target are left out. Tokens whose log-probabilities a cache rounds to the same are equally likely.
    ``inputs.logit_codec`` must be given.
    """
    assert inputs.logit_codec is not None, "agreement is asked for where there are logit targets"
    hidden_PD = inputs.student_hidden_AD
    if inputs.targets.paired_P is not None:
        hidden_PD = hidden_PD[inputs.targets.paired_P]
    teacher_of = inputs.logit_codec.teacher(inputs.targets.answers)
    rows = max(1, _SCRATCH_BYTES // (4 * len(head_ND)))
    agreeing = torch.zeros((), device=hidden_PD.device)
    for start in range(0, len(hidden_PD), rows):
        part = slice(start, start + rows)
        logits_PN = torch.nn.functional.linear(hidden_PD[part].to(head_ND.dtype), head_ND, bias_N)
        agreeing = agreeing + _is_likeliest(logits_PN.argmax(dim=1), teacher_of(part)).sum()
    return torch.stack([agreeing, torch.full_like(agreeing, len(hidden_PD))])


def _is_likeliest(ids_P: torch.Tensor, teacher: TeacherAnswers) -> torch.Tensor:
    """Whether no token is likelier for the teacher; a cache rounds log-probabilities, so that several may be the likeliest."""
    if teacher.ids_AX.shape[1] == 0:
        assert teacher.tail_logits_AN is not None
        return teacher.tail_logits_AN.gather(1, ids_P[:, None])[:, 0] >= teacher.tail_logits_AN.amax(dim=1)
    likeliest_AX = teacher.logprobs_AX >= teacher.logprobs_AX.amax(dim=1, keepdim=True)
    return (likeliest_AX & (teacher.ids_AX == ids_P[:, None])).any(dim=1)
