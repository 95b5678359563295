"""Targets that give every token a log-probability: a sketch of the tail, or the last hidden state.

Shapes: A answers, K kept tokens, D teacher width, N vocabulary, S bytes of a sketch.
"""

from collections.abc import Mapping

import torch

from alignkd.targets.logit_settings import LogitSettings
from alignkd.targets.logits.answers import TeacherAnswers, TeacherReader
from alignkd.targets.logits.base import Calibration, FieldShape, LogitCodec, part_of
from alignkd.targets.logits.sketch import Sketch, fit_sketch
from alignkd.targets.logits.topk import TopK, Values, kept_fields

_SKETCH = ("mean", "projection", "bits", "step", "base", "head")


class Sketched(TopK):
    """Top-k with a sketch of the tail's shape; the tail's mass and the kept tokens stay exact."""

    kind = "sketch"
    whole_vocabulary = True

    @classmethod
    def tensor_names(cls) -> tuple[str, ...]:
        """The ids by rank, and the parts of a :class:`Sketch`."""
        return (*super().tensor_names(), *(f"sketch_{name}" for name in _SKETCH))

    @classmethod
    def calibrate(cls, settings: LogitSettings, calibration: Calibration) -> dict[str, torch.Tensor]:
        """Fitted to the calibration's hidden states."""
        c = calibration
        sketch = fit_sketch(c.hidden_MD, c.head_ND, c.bias_N, c.mean_probability_N, settings.sketch_bytes)
        parts = (sketch.mean_D, sketch.projection_RD, sketch.bits_R, sketch.step_R, sketch.base_N, sketch.head_NR)
        return super().calibrate(settings, c) | {f"sketch_{name}": t for name, t in zip(_SKETCH, parts, strict=True)}

    @classmethod
    def fields(cls, settings: LogitSettings, vocabulary: int) -> dict[str, FieldShape]:
        """Kept tokens and tail as in top-k, and the packed coordinates."""
        return kept_fields(vocabulary) | {"sketch": FieldShape(("S",), "uint8")}

    @property
    def sketch(self) -> Sketch:
        """On the device of this module."""
        mean_D, projection_RD, bits_R, step_R, base_N, head_NR = (self.get_buffer(f"sketch_{name}") for name in _SKETCH)
        return Sketch(mean_D, projection_RD, bits_R, step_R, base_N, head_NR, self.settings.sketch_bytes)

    def _encode_more(
        self, hidden_AD: torch.Tensor, logsumexp_A: torch.Tensor, rest_AN: torch.Tensor, uniform_AX: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return {"sketch": self.sketch.encode(hidden_AD)}

    def teacher(self, values: Values) -> TeacherReader:
        """The kept tokens, and a tail with a shape."""
        decode = self.sketch.decoder()
        return lambda part: TeacherAnswers(*self.kept(part_of(values, part)), decode(values["sketch"][part]))


class Hidden(LogitCodec):
    """The last hidden state, with the teacher's output head stored once: every logit, at any temperature.

    Features are divided by powers of two near their standard deviations, so that one scale per token suits large and small
    ones; the head is multiplied by the same powers, which is exact.
    """

    kind = "hidden"
    whole_vocabulary = True
    output_head: torch.Tensor
    output_bias: torch.Tensor
    feature_scale: torch.Tensor

    @classmethod
    def tensor_names(cls) -> tuple[str, ...]:
        """The output head, its bias (zeros where it has none), and the scale of each feature."""
        return ("output_head", "output_bias", "feature_scale")

    @classmethod
    def calibrate(cls, settings: LogitSettings, calibration: Calibration) -> dict[str, torch.Tensor]:
        """The head, scaled."""
        head_ND, bias_N = calibration.head_ND, calibration.bias_N
        deviation_D = calibration.hidden_MD.float().std(dim=0, correction=0).clamp(min=2.0**-10)
        scale_D = deviation_D.log2().round().exp2()
        return {
            "output_head": head_ND * scale_D.to(head_ND.dtype),
            "output_bias": head_ND.new_zeros(len(head_ND)) if bias_N is None else bias_N,
            "feature_scale": scale_D,
        }

    @classmethod
    def fields(cls, settings: LogitSettings, vocabulary: int) -> dict[str, FieldShape]:
        """The hidden state: in 8 bits with one scale per token, or in 16 bits."""
        return {"hidden": FieldShape(("D",), "float32", {8: "int8-rows", 16: "float16"}[settings.hidden_bits])}

    def encode(
        self, hidden_AD: torch.Tensor, logits_AN: torch.Tensor, label_ids_A: torch.Tensor, uniform_AX: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """See :meth:`LogitCodec.encode`."""
        return {"hidden": hidden_AD.float() / self.feature_scale}

    def teacher(self, values: Mapping[str, torch.Tensor]) -> TeacherReader:
        """No single tokens: all of the mass is in the tail, whose shape is the logits."""
        head_ND, bias_N, kind = self.output_head, self.output_bias, self.output_head.device.type
        if torch.is_autocast_enabled(kind):
            head_ND, bias_N = (t.to(torch.get_autocast_dtype(kind)) for t in (head_ND, bias_N))

        def read(part: slice) -> TeacherAnswers:
            hidden_AD = values["hidden"][part].to(head_ND.dtype)
            ids_AX = torch.empty(len(hidden_AD), 0, dtype=torch.long, device=hidden_AD.device)
            none_AX = torch.empty(ids_AX.shape, device=hidden_AD.device)
            with torch.autocast(kind, enabled=False):
                logits_AN = torch.nn.functional.linear(hidden_AD, head_ND, bias_N)
            return TeacherAnswers(ids_AX, none_AX, none_AX.sum(dim=1), logits_AN)

        return read
