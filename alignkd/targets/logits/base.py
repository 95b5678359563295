"""What every form of logit targets offers: fields of a row, tensors of a cache, and what they say of the teacher.

Shapes: A answers, M calibration answers, D teacher width, N vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from alignkd.targets.logit_settings import LogitSettings
from alignkd.targets.logits.answers import TeacherReader


@dataclass(frozen=True)
class FieldShape:
    """A field of a row: names of the axes of one answer token, dtype of its values, and codec of the cache."""

    dims: tuple[str, ...]
    dtype: str
    codec: str = "exact"


@dataclass(frozen=True)
class Calibration:
    """The teacher on a few samples: last hidden states, output head, and the mean answer distribution."""

    hidden_MD: torch.Tensor
    head_ND: torch.Tensor
    bias_N: torch.Tensor | None
    mean_probability_N: torch.Tensor


class LogitCodec(nn.Module, ABC):
    """One form of logit targets. Its tensors are stored once per cache and move with the module.

    ``whole_vocabulary``: the targets give each token its own log-probability.
    """

    kind: ClassVar[str]
    whole_vocabulary: ClassVar[bool] = False

    def __init__(self, settings: LogitSettings, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.settings = settings
        for name in self.tensor_names():
            self.register_buffer(name, tensors[name], persistent=False)

    @classmethod
    @abstractmethod
    def tensor_names(cls) -> tuple[str, ...]:
        """What :meth:`calibrate` gives."""

    @classmethod
    @abstractmethod
    def calibrate(cls, settings: LogitSettings, calibration: Calibration) -> dict[str, torch.Tensor]:
        """The tensors that a cache stores once."""

    @classmethod
    @abstractmethod
    def fields(cls, settings: LogitSettings, vocabulary: int) -> dict[str, FieldShape]:
        """What is stored for each answer token, by name; the first axis is the answers."""

    @abstractmethod
    def encode(
        self, hidden_AD: torch.Tensor, logits_AN: torch.Tensor, label_ids_A: torch.Tensor, uniform_AX: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The fields of answers, from the teacher's last hidden states and logits.

        ``uniform_AX``: random numbers in (0, 1], ``[A, draws]``, for the kinds that draw.
        """

    @abstractmethod
    def teacher(self, values: Mapping[str, torch.Tensor]) -> TeacherReader:
        """What the targets say of the teacher, a slice of answers at a time; what slices share is prepared once.

        Under autocast, matrix products are in its dtype.
        """


def part_of(values: Mapping[str, torch.Tensor], part: slice) -> dict[str, torch.Tensor]:
    """The values of some answers."""
    return {name: value[part] for name, value in values.items()}


def rank_dtype(vocabulary: int) -> str:
    """The smallest unsigned integer that holds a rank."""
    return "uint16" if vocabulary <= 2**16 else "uint32"
