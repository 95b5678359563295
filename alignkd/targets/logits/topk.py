"""The likeliest tokens and the mass of all others; and, drawn at random, some of the others.

Shapes: A answers, K kept tokens, J draws, N vocabulary, X outcomes, or known tokens without the bucket.
"""

from collections.abc import Mapping

import torch

from alignkd.targets.logit_levels import LOWEST_CODE
from alignkd.targets.logit_settings import LogitSettings
from alignkd.targets.logits.answers import Draws, TeacherAnswers, TeacherReader
from alignkd.targets.logits.base import Calibration, FieldShape, LogitCodec, part_of, rank_dtype
from alignkd.targets.logits.kept import (
    choose,
    decode_ids,
    decode_logprobs,
    encode_ids,
    encode_logprobs,
    rank_order,
    renormalise,
)

LEAST_TAIL = -100.0
"""Log of the mass of an empty tail: 16 bits can hold it."""

Values = Mapping[str, torch.Tensor]


class TopK(LogitCodec):
    """The likeliest tokens, the label always among them, with log-sum-exp and the tail as one bucket.

    With one bucket, how the student distributes the tail's mass does not count: the divergence is a lower bound of the dense
    one.
    """

    kind = "topk"
    id_of_rank: torch.Tensor

    @classmethod
    def tensor_names(cls) -> tuple[str, ...]:
        """The ids by rank."""
        return ("id_of_rank",)

    @classmethod
    def calibrate(cls, settings: LogitSettings, calibration: Calibration) -> dict[str, torch.Tensor]:
        """Tokens in the order of the teacher's mean probability."""
        return {"id_of_rank": rank_order(calibration.mean_probability_N)}

    @classmethod
    def fields(cls, settings: LogitSettings, vocabulary: int) -> dict[str, FieldShape]:
        """Ranks, log-probabilities, the tail's log mass, and the log-sum-exp of the logits at the temperature."""
        return kept_fields(vocabulary) | {"logsumexp": FieldShape((), "float32", "float16")}

    def encode(
        self, hidden_AD: torch.Tensor, logits_AN: torch.Tensor, label_ids_A: torch.Tensor, uniform_AX: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """See :meth:`LogitCodec.encode`."""
        scaled_AN = logits_AN.float() / self.settings.temperature
        logsumexp_A1 = scaled_AN.logsumexp(dim=1, keepdim=True)
        logprobs_AN = scaled_AN - logsumexp_A1
        ids_AK = choose(logprobs_AN, self.settings.top_k, label_ids_A)
        rest_AN = logprobs_AN.scatter(1, ids_AK, -torch.inf)
        steps_AK, order_AK = encode_ids(ids_AK, self.rank_of_id())
        return {
            "topk_rank_steps": steps_AK,
            "topk_logprob_codes": encode_logprobs(logprobs_AN.gather(1, ids_AK).gather(1, order_AK)),
            "tail_logmass": rest_AN.logsumexp(dim=1).clamp(min=LEAST_TAIL),
        } | self._encode_more(hidden_AD, logsumexp_A1[:, 0], rest_AN, uniform_AX)

    def _encode_more(
        self, hidden_AD: torch.Tensor, logsumexp_A: torch.Tensor, rest_AN: torch.Tensor, uniform_AX: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The fields besides kept tokens and tail mass; ``rest_AN`` are the log-probabilities of the other tokens."""
        return {"logsumexp": logsumexp_A}

    def rank_of_id(self) -> torch.Tensor:
        """The inverse of ``id_of_rank``."""
        ranks_N = torch.arange(len(self.id_of_rank), device=self.id_of_rank.device)
        return torch.empty_like(ranks_N).scatter(0, self.id_of_rank.long(), ranks_N)

    def kept(self, values: Values) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids and log-probabilities of the kept tokens ``[A, K]``, and the log mass of all others ``[A]``; they sum to one."""
        ids_AK = decode_ids(values["topk_rank_steps"], self.id_of_rank)
        return ids_AK, *renormalise(decode_logprobs(values["topk_logprob_codes"]), values["tail_logmass"].float())

    def teacher(self, values: Values) -> TeacherReader:
        """The kept tokens and one bucket."""
        return lambda part: TeacherAnswers(*self.kept(part_of(values, part)))


class Sampled(TopK):
    """A few likeliest tokens, and draws from the rest, unbiased: forward KL and its gradient are right on average.

    After random-sampling KD ("Sparse Logit Sampling", arXiv 2503.16870), with the likeliest tokens kept out of the draw, which
    takes most of the noise away; a draw then weighs tail mass / draws. Reverse KL and Jensen-Shannon are not linear in the
    teacher's probabilities: for them the drawn tokens are known ones, and the others are one bucket.
    """

    kind = "sampled"

    @classmethod
    def fields(cls, settings: LogitSettings, vocabulary: int) -> dict[str, FieldShape]:
        """Kept tokens and tail as in top-k, and ranks and log-probabilities of the draws, repetitions included."""
        return kept_fields(vocabulary) | {
            "draw_rank_steps": FieldShape(("J",), rank_dtype(vocabulary)),
            "draw_logprob_codes": FieldShape(("J",), "uint8"),
        }

    def _encode_more(
        self, hidden_AD: torch.Tensor, logsumexp_A: torch.Tensor, rest_AN: torch.Tensor, uniform_AX: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        # Zero probability, not NaN, where nothing at all is left to draw from.
        probability_AN = rest_AN.softmax(dim=1).nan_to_num()
        heaps_AN = probability_AN.cumsum(dim=1)
        wanted_AJ = uniform_AX.to(heaps_AN) * heaps_AN[:, -1:]
        ids_AJ = torch.searchsorted(heaps_AN, wanted_AJ).clamp(max=rest_AN.shape[1] - 1)
        steps_AJ, order_AJ = encode_ids(ids_AJ, self.rank_of_id())
        logprobs_AJ = rest_AN.gather(1, ids_AJ).gather(1, order_AJ)
        return {"draw_rank_steps": steps_AJ, "draw_logprob_codes": encode_logprobs(logprobs_AJ)}

    def known(self, values: Values) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Kept tokens, then drawn ones, and the log mass of all others; -inf for what is drawn again."""
        ids_AK, logprobs_AK, tail_A = self.kept(values)
        steps_AJ, codes_AJ = values["draw_rank_steps"].long(), values["draw_logprob_codes"]
        again_AJ = steps_AJ == 0
        again_AJ[:, 0] = False
        # The lowest code is also that of a kept token, drawn where no other has any probability.
        drawn_AJ = decode_logprobs(codes_AJ).masked_fill(again_AJ | (codes_AJ == LOWEST_CODE), -torch.inf)
        # Rounded log-probabilities of drawn tokens may exceed the mass they were drawn from.
        left_A = (tail_A.exp() - drawn_AJ.exp().sum(dim=1)).clamp(min=1e-4 * tail_A.exp()).log()
        known_AX = torch.cat([logprobs_AK, drawn_AJ, left_A[:, None]], dim=1).log_softmax(dim=1)
        ids_AX = torch.cat([ids_AK, decode_ids(steps_AJ, self.id_of_rank)], dim=1)
        return ids_AX, known_AX[:, :-1], known_AX[:, -1]

    def teacher(self, values: Values) -> TeacherReader:
        """The kept tokens, the drawn ones, and one bucket."""
        if values["topk_rank_steps"].shape[1] == len(self.id_of_rank):  # there was nothing to draw from
            return super().teacher(values)
        return lambda part: self._with_draws(part_of(values, part))

    def _with_draws(self, values: Values) -> TeacherAnswers:
        _, logprobs_AK, tail_A = self.kept(values)
        drawn_AJ = decode_logprobs(values["draw_logprob_codes"])
        ids_AX, known_AX, left_A = self.known(values)
        k, draws = logprobs_AK.shape[1], drawn_AJ.shape[1]
        same_AJX = ids_AX[:, k:, None] == ids_AX[:, None, :]
        # Draw j is at k + j: it is a repeat where its id occurs before that.
        again_AJ = same_AJX.tril(k - 1).any(dim=2)
        repeats_AX = torch.cat([torch.zeros_like(ids_AX[:, :k], dtype=torch.bool), again_AJ], dim=1)
        of_draws_AX = same_AJX.sum(dim=1) * (tail_A.exp() / draws)[:, None]
        weights_AX = torch.cat([logprobs_AK.exp(), torch.zeros_like(drawn_AJ)], dim=1) + of_draws_AX
        negentropy_A = (logprobs_AK.exp() * logprobs_AK).sum(dim=1) + tail_A.exp() * drawn_AJ.mean(dim=1)
        return TeacherAnswers(
            ids_AX, known_AX, left_A, draws=Draws(repeats_AX, weights_AX.masked_fill(repeats_AX, 0.0), negentropy_A)
        )


def kept_fields(vocabulary: int) -> dict[str, FieldShape]:
    """Kept tokens and the mass of all others."""
    return {
        "topk_rank_steps": FieldShape(("K",), rank_dtype(vocabulary)),
        "topk_logprob_codes": FieldShape(("K",), "uint8"),
        "tail_logmass": FieldShape((), "float32", "float16"),
    }
