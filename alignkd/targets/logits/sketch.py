"""The shape of the tail in a few bytes: the teacher's last hidden state on the directions that move the logits most.

Logits are ``W h``. Measured in the metric of a weight per token (half the teacher's mean distribution, half uniform), the
principal directions of the centred logits of a calibration set are found; a hidden state is projected on them, and each
coordinate gets bits by its variance (reverse water-filling: the same error for all), until the bytes per token are used up.
The reduced head that turns coordinates back into logits is stored once per cache.

Source: METHOD of this project ("top-k + sketch"); rate allocation as in Cover and Thomas, Elements of Information Theory,
section 10.3.

Shapes: A answers, M calibration answers, D teacher width, N vocabulary, R coordinates, S bytes per token, Q rank of the
centred head, at most D.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Range of a quantiser by its number of bits, in standard deviations: wide enough for heavy tails, narrow enough for few levels.
_RANGE = {2: 1.5, 3: 2.3, 4: 2.9, 5: 3.5, 6: 4.0, 7: 4.5, 8: 5.0}

_ROUNDING = 1e-5
"""A metric that was computed in float32 is not told from a singular one where a pivot has less than this share of its mean."""
_LEAST_SHARE = 1e-9
"""A direction with less than this share of the largest one moves no logit."""
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Sketch:
    """What a cache stores once; the text of this module explains it.

    ``mean_D`` and ``projection_RD`` turn a hidden state into coordinates; ``bits_R`` (uint8) and ``step_R`` quantise them;
    ``base_N + coordinates_AR @ head_NR.T`` are centred logits; ``size`` is S.
    """

    mean_D: torch.Tensor
    projection_RD: torch.Tensor
    bits_R: torch.Tensor
    step_R: torch.Tensor
    base_N: torch.Tensor
    head_NR: torch.Tensor
    size: int

    def encode(self, hidden_AD: torch.Tensor) -> torch.Tensor:
        """Packed coordinates, ``[A, S]`` of uint8."""
        coordinates_AR = (hidden_AD.float() - self.mean_D) @ self.projection_RD.T
        levels_R = 2 ** self.bits_R.int()
        codes_AR = ((coordinates_AR / self.step_R).floor() + levels_R / 2).clamp(min=0).minimum(levels_R - 1).int()
        return pack_bits(codes_AR, self.bits_R, self.size)

    def coordinates(self, packed_AS: torch.Tensor) -> torch.Tensor:
        """Coordinates ``[A, R]`` in float32, each in the middle of its level."""
        levels_R = 2 ** self.bits_R.int()
        return (unpack_bits(packed_AS, self.bits_R) + 0.5 - levels_R / 2) * self.step_R

    def decoder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Packed coordinates ``[A, S]`` to centred logits ``[A, N]`` in float32; the head is converted once for many calls."""
        # Half precision is fast on a GPU and slow on a CPU.
        dtype = torch.float16 if self.head_NR.is_cuda else torch.float32
        head_NR, base_N = self.head_NR.to(dtype), self.base_N.float()

        def decode(packed_AS: torch.Tensor) -> torch.Tensor:
            with torch.autocast(packed_AS.device.type, enabled=False):
                return (self.coordinates(packed_AS).to(dtype) @ head_NR.T).float().add_(base_N)

        return decode


def fit_sketch(
    hidden_MD: torch.Tensor, head_ND: torch.Tensor, bias_N: torch.Tensor | None, mean_probability_N: torch.Tensor, size: int
) -> Sketch:
    """The best sketch of ``size`` bytes per token for these hidden states; the D x D problems are solved in float64."""
    weight_N = 0.5 * mean_probability_N.float() + 0.5 / len(mean_probability_N)
    centred_ND = head_ND.float() - weight_N @ head_ND.float()
    metric_DD = (centred_ND.T @ (weight_N[:, None] * centred_ND)).double()
    mean_D = hidden_MD.float().mean(dim=0)
    spread_MD = (hidden_MD.float() - mean_D).double()
    covariance_DD = spread_MD.T @ spread_MD / len(hidden_MD)
    # Directions in which no calibration answer varies get a little variance, so that their scale is not zero.
    covariance_DD.diagonal().add_(1e-4 * covariance_DD.diagonal().mean() + 1e-12)
    root_DQ, inverse_QD = _root(metric_DD, centred_ND, weight_N)
    variance_Q, directions_QQ = torch.linalg.eigh(root_DQ.T @ covariance_DD @ root_DQ)
    variance_Q, directions_QQ = variance_Q.flip(0).clamp(min=0), directions_QQ.flip(1)
    bits_Q = allocate(variance_Q, 8 * size)
    used_Q = bits_Q > 0
    chosen_QR = directions_QQ[:, used_Q]
    bits_R, deviation_R = bits_Q[used_Q], variance_Q[used_Q].sqrt().float()
    range_R = torch.tensor([_RANGE[int(b)] for b in bits_R.tolist()], device=deviation_R.device)
    back_DR = inverse_QD(chosen_QR)
    return Sketch(
        mean_D=mean_D,
        projection_RD=(chosen_QR.T @ root_DQ.T).float().contiguous(),
        bits_R=bits_R.to(torch.uint8),
        step_R=2 * range_R * deviation_R / 2.0 ** bits_R.float(),
        base_N=(centred_ND @ mean_D + (0.0 if bias_N is None else bias_N.float() - weight_N @ bias_N.float())).half(),
        head_NR=(centred_ND @ back_DR.float()).half(),
        size=size,
    )


def _root(
    metric_DD: torch.Tensor, centred_ND: torch.Tensor, weight_N: torch.Tensor
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """A root ``[D, Q]`` that times its transpose is the metric, and the inverse of its transpose, ``[Q, R] -> [D, R]``.

    Q is D, or the rank of the head where it is less: directions that move no logit get no coordinate.
    """
    mean = metric_DD.diagonal().mean()
    positive_DD = metric_DD.clone()
    positive_DD.diagonal().add_(1e-9 * mean + 1e-12)
    root_DD, failed = torch.linalg.cholesky_ex(positive_DD)
    if not failed and root_DD.diagonal().min() ** 2 > _ROUNDING * mean:
        return root_DD, lambda columns_QR: torch.linalg.solve_triangular(root_DD.T, columns_QR, upper=True)
    # In float32 the directions of a head of low rank cannot be told from rounding.
    exact_DD = torch.zeros_like(metric_DD)
    for rows_ND, weights_N in zip(torch.split(centred_ND, _ROWS_AT_ONCE), torch.split(weight_N, _ROWS_AT_ONCE), strict=True):
        exact_DD += rows_ND.double().T @ (weights_N.double()[:, None] * rows_ND.double())
    values_D, vectors_DD = torch.linalg.eigh(exact_DD)
    kept_D = values_D > _LEAST_SHARE * values_D.max()
    scale_Q, vectors_DQ = values_D[kept_D].sqrt(), vectors_DD[:, kept_D]
    return vectors_DQ * scale_Q, lambda columns_QR: vectors_DQ @ (columns_QR / scale_Q[:, None])


def allocate(variance_D: torch.Tensor, total: int) -> torch.Tensor:
    """Bits of each coordinate, 0 or 2 to 8, at most ``total`` in all: half the log of its variance over a common error."""
    rate_D = 0.5 * variance_D.clamp(min=torch.finfo(variance_D.dtype).tiny).log2()

    def bits_at(water: float) -> torch.Tensor:
        bits_D = (rate_D - water).round().clamp(0, 8)
        return torch.where(bits_D < 2, torch.zeros_like(bits_D), bits_D).long()

    low, high = float(rate_D.min()) - 9, float(rate_D.max())  # all bits at the low end, none at the high one
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if int(bits_at(middle).sum()) <= total else (middle, high)
    return bits_at(high)


def pack_bits(codes_AR: torch.Tensor, bits_R: torch.Tensor, size: int) -> torch.Tensor:
    """Codes side by side without gaps, the first in the highest bits of ``size`` bytes; ``[A, S]`` of uint8."""
    byte_R, shift_R = _bit_positions(bits_R)
    words_AR = codes_AR.int() << shift_R
    packed_AS = torch.zeros(len(codes_AR), size + 1, dtype=torch.int32, device=codes_AR.device)
    packed_AS.index_add_(1, byte_R, words_AR >> 8)
    packed_AS.index_add_(1, byte_R + 1, words_AR & 255)
    return packed_AS[:, :size].to(torch.uint8)


def unpack_bits(packed_AS: torch.Tensor, bits_R: torch.Tensor) -> torch.Tensor:
    """The codes of :func:`pack_bits`, ``[A, R]`` of int32."""
    byte_R, shift_R = _bit_positions(bits_R)
    padded_AS = torch.nn.functional.pad(packed_AS, (0, 1)).int()
    words_AR = (padded_AS[:, byte_R] << 8) | padded_AS[:, byte_R + 1]
    return (words_AR >> shift_R) & (2 ** bits_R.int() - 1)


def _bit_positions(bits_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First byte of each code, and how far its end lies from the end of the two bytes it may touch."""
    start_R = bits_R.long().cumsum(0) - bits_R.long()
    return start_R // 8, (16 - start_R % 8 - bits_R.long()).int()
