"""Where logit targets meet cache and jobs: their fields, the tensors a cache keeps once for them, and numbers to draw by.

Shapes: A answers, M calibration answers, D teacher width, N vocabulary, J draws.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from alignkd.batch import Batch
from alignkd.cache_store.spec import FieldSpec
from alignkd.capture import capture
from alignkd.logits import LOGIT_CODECS, Calibration, LogitCodec, LogitSettings
from alignkd.models.vlm import Vlm
from alignkd.pipeline.out_of_memory import is_out_of_memory

CALIBRATION_SAMPLES = 256
CALIBRATION_ANSWERS = 16_384
CALIBRATION_POSITIONS = 4096
"""Positions a batch, few enough for any device that the teacher itself fits on."""
_NAME = "logits.{}"
_AT_ONCE = 2**25
"""Logits held at a time."""


def fitted(settings: LogitSettings, vocabulary: int, width: int) -> LogitSettings:
    """No more kept tokens than there are, no more bytes of a sketch than a hidden state has features.

    ``vocabulary``: columns of the teacher's output head.

    Raises:
        ValueError: the settings are for more ids than that.
    """
    wanted = vocabulary if settings.vocabulary is None else settings.vocabulary
    if wanted > vocabulary:
        raise ValueError(
            f"--logit-vocabulary {wanted}: the teacher's output head has {vocabulary} columns; give as many as the student's"
            " head has, or leave the option out"
        )
    changes = {"top_k": min(settings.top_k, wanted), "sketch_bytes": min(settings.sketch_bytes, width)}
    return LogitSettings(**{**vars(settings), **changes})


def logit_fields(settings: LogitSettings, vocabulary: int) -> tuple[FieldSpec, ...]:
    """The fields of a row, one entry an answer token. ``vocabulary``: columns of the output head."""
    shapes = LOGIT_CODECS[settings.kind].fields(settings, settings.vocabulary or vocabulary)
    return tuple(FieldSpec(name, ("A", *shape.dims), shape.dtype, shape.codec) for name, shape in shapes.items())


def settings_of(fingerprint: Mapping[str, Any]) -> LogitSettings:
    """The settings a cache was written with.

    Raises:
        ValueError: it describes none.
    """
    found = fingerprint["targets"]["logits"]
    try:
        return LogitSettings(**{name: value for name, value in found.items() if value is not None})
    except TypeError as error:
        raise ValueError(f"the cache describes logit targets {found!r}, which are none: write another cache") from error


def logit_width(fingerprint: Mapping[str, Any]) -> int:
    """N: ids that a cache's distributions are over, or would be if it held any."""
    found = fingerprint["targets"]["logits"] or {}
    return int(found.get("vocabulary", fingerprint["teacher"]["vocabulary"]))


@torch.inference_mode()
def calibrate(teacher: Vlm, batches: Iterable[Batch], vocabulary: int | None = None) -> Calibration:
    """What the teacher does on a few batches, as many as give the answers wanted; without those that memory has no room for.

    ``vocabulary``: see :class:`alignkd.logits.LogitSettings`.
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
    if not count:  # every sample tried is without an answer: any order of tokens will do
        hidden, sums_N, count = [hidden[0].new_zeros(1, teacher.hidden_size)], torch.ones_like(sums_N), len(sums_N)
    return Calibration(torch.cat(hidden), head_ND, bias_N, sums_N / count)


def logit_arrays(settings: LogitSettings, calibration: Calibration) -> dict[str, np.ndarray]:
    """The tensors that a cache keeps once, by name; the bits of bfloat16 as uint16."""
    tensors = LOGIT_CODECS[settings.kind].calibrate(settings, calibration)
    return {_NAME.format(name): _to_array(tensor.cpu()) for name, tensor in tensors.items()}


def open_codec(settings: LogitSettings, arrays: Mapping[str, np.ndarray], device: torch.device | str) -> LogitCodec:
    """The codec with its tensors on a device."""
    kind = LOGIT_CODECS[settings.kind]
    return kind(settings, {name: _to_tensor(arrays[_NAME.format(name)]) for name in kind.tensor_names()}).to(device)


def answers_at_once(teacher: Vlm) -> int:
    """Answers whose logits may exist at a time."""
    return max(1, _AT_ONCE // teacher.vocabulary)


def draw_numbers(keys: Sequence[str], answers_of_sample: Sequence[int], draws: int) -> torch.Tensor:
    """Random numbers in (0, 1], ``[A, J]``: of each sample a function of its key alone, in whatever batch it is."""
    parts = [
        1 - np.random.Generator(np.random.Philox(key=int(key, 16))).random((answers, draws), np.float32)
        for key, answers in zip(keys, answers_of_sample, strict=True)
    ]
    return torch.from_numpy(np.concatenate([np.empty((0, draws), np.float32), *parts]))


def _to_array(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
    return array


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
