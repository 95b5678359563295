"""Targets of several teachers for one batch, and how much each teacher counts for each of its samples.

A sample's weights add up to 1. Terms are means in which a sample that two teachers teach counts as one sample.

Shapes: K teachers, B samples, A answers, X some of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from alignkd.inputs.batch import Batch, Counts
from alignkd.targets.batch_targets import Targets


@dataclass(frozen=True)
class AnswerPart:
    """Answers for which one teacher counts equally.

    ``teacher``: its number, None where no teacher has targets for them. ``weight``: how much it counts. ``supervised``: whether
    this part brings their supervised term, which counts once, however many teachers they have. ``places_X``: the answers among
    those of the batch; None: all of them. ``rows_X``: the same answers among the teacher's targets; None: all of those.
    """

    teacher: int | None
    weight: float
    supervised: bool
    places_X: torch.Tensor | None = None
    rows_X: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "AnswerPart":
        """The part with its tensors changed."""
        places, rows = (None if given is None else function(given) for given in (self.places_X, self.rows_X))
        return replace(self, places_X=places, rows_X=rows)


@dataclass(frozen=True)
class SeveralTargets:
    """``teachers``: the targets of each, with masks that leave out the samples of others; None where it teaches none of them.

    ``weights_KB``: how much each teacher counts for each sample, 0 for those of others. ``parts``: which answers have targets
    from which teacher. ``taught``: what each teacher has targets for, counted. ``weighted``: the same, each by its weight.
    """

    teachers: tuple[Targets | None, ...]
    weights_KB: torch.Tensor
    parts: tuple[AnswerPart, ...]
    taught: tuple[Counts, ...]
    weighted: Counts

    def counts(self, batch: Batch) -> Counts:
        """What the terms of this batch are averaged over; nothing waits for a device."""
        return self.weighted

    def to(self, device: torch.device | str) -> "SeveralTargets":
        """The targets on another device (asynchronously from pinned memory)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True), lambda targets: targets.to(device))

    def pin_memory(self) -> "SeveralTargets":
        """Page-locked copies, so that :meth:`to` need not wait."""
        return self._map(lambda tensor: tensor.pin_memory(), lambda targets: targets.pin_memory())

    def _map(
        self, function: Callable[[torch.Tensor], torch.Tensor], of_targets: Callable[[Targets], Targets]
    ) -> "SeveralTargets":
        return replace(
            self,
            teachers=tuple(None if targets is None else of_targets(targets) for targets in self.teachers),
            weights_KB=function(self.weights_KB),
            parts=tuple(part.map(function) for part in self.parts),
        )


def teacher_name(number: int) -> str:
    """What log lines call a teacher: ``teacher1`` is the one of the first cache."""
    return f"teacher{number + 1}"


def combine(teachers: Sequence[Targets | None], weights_KB: np.ndarray, batch: Batch) -> SeveralTargets:
    """The targets of several teachers together. All of it must be on the host.

    The masks of each teacher leave out the samples of others, for which its weight is 0; ``answers`` hold its own alone.
    """
    samples_A = batch.answer_samples_A.numpy()
    weights_KA = np.zeros((len(teachers), len(samples_A)))
    sums, taught = np.zeros(2), []
    for number, targets in enumerate(teachers):
        weight_B = weights_KB[number]
        if targets is None:
            taught.append(Counts(answers=0, with_text_after_image=0, with_image=0, samples=0))
            continue
        paired_P = np.arange(len(samples_A)) if targets.paired_P is None else targets.paired_P.numpy()
        paired_P = paired_P if targets.answers else paired_P[:0]
        weights_KA[number, paired_P] = weight_B[samples_A[paired_P]]
        masked = targets.mask_to_targets(batch)
        has_2B = np.stack([masked.samples_with_text_after_image().numpy(), masked.samples_with_image().numpy()])
        sums += has_2B @ weight_B
        with_text, with_image = has_2B.sum(axis=1).tolist()
        samples = int((weight_B > 0).sum())
        taught.append(Counts(answers=len(paired_P), with_text_after_image=with_text, with_image=with_image, samples=samples))
    weighted = Counts(
        answers=len(samples_A), with_text_after_image=float(sums[0]), with_image=float(sums[1]), samples=batch.samples
    )
    weights = torch.from_numpy(weights_KB.astype(np.float32))
    return SeveralTargets(tuple(teachers), weights, tuple(_answer_parts(weights_KA)), tuple(taught), weighted)


def _answer_parts(weights_KA: np.ndarray) -> Iterator[AnswerPart]:
    """Answers of equal weights together: one part without a teacher, or one for each of theirs."""
    answers = weights_KA.shape[1]
    if not answers:
        yield AnswerPart(None, 1.0, True)
        return
    kinds_KG, kind_A = np.unique(weights_KA, axis=1, return_inverse=True)
    for kind, weight_K in enumerate(kinds_KG.T):
        places = np.flatnonzero(kind_A.reshape(-1) == kind)
        places_X = None if len(places) == answers else torch.from_numpy(places)
        teachers = np.flatnonzero(weight_K).tolist()
        if not teachers:
            yield AnswerPart(None, 1.0, True, places_X)
        for number in teachers:
            its = np.flatnonzero(weights_KA[number])
            rows_X = None if len(its) == len(places) else torch.from_numpy(np.searchsorted(its, places))
            yield AnswerPart(number, float(weight_K[number]), number == teachers[0], places_X, rows_X)
