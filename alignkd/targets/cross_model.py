"""Cross-architecture targets: those of a teacher, in the layout of a student of another model family.

1. Vision tokens are matched by coordinates. The attention on a teacher's token is shared among the student's tokens that lie
   over the same part of the image, by area; the target of a student's token is the mean, by area, of the teacher's there.
2. Text rows are matched by characters. The target of a student's row is the mean of the teacher's rows over the same
   characters, where the same images come before both.
3. Answer tokens are matched by id and characters: the target is the logits of the matching answer token of the teacher.

Equal layouts give exact identities.

Shapes: R regions, V vision tokens of a sample, T text rows, L ids, A answers; a trailing t or s: of teacher or student.
"""

from collections import defaultdict, deque
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from alignkd.errors import SampleError
from alignkd.inputs.prompts import IGNORE
from alignkd.inputs.regions import COLUMNS, boxes, tokens_of

_TINY = 1e-6
"""In units of a token's side: neighbouring cells overlap by rounding errors, which are not counted."""


class CrossModelError(SampleError):
    """A sample whose targets cannot be mapped from the teacher to the student; the message says why."""


@dataclass(frozen=True)
class VisionMap:
    """Between the vision tokens of a teacher and those of a student, for one sample, float32.

    ``share`` ``[Vt, Vs]``: attention on the teacher's columns times ``share`` is attention on the student's. ``mean``
    ``[Vs, Vt]``: ``mean`` times the teacher's vision tokens are the student's targets. ``known`` ``[Vs]``: which of the
    student's tokens have a target.
    """

    share: np.ndarray
    mean: np.ndarray
    known: np.ndarray


@dataclass(frozen=True)
class RowMap:
    """``mean`` ``[Ts, Tt]`` times the teacher's rows are the student's targets; ``known`` ``[Ts]``: which have one."""

    mean: np.ndarray
    known: np.ndarray


@dataclass(frozen=True)
class Text:
    """A sample's text on one side: ids and labels ``[L]``, spans ``[L, 2]`` (:mod:`alignkd.inputs.spans`).

    ``image_token_id`` in ``input_ids`` stands for ``tokens_per_placeholder`` vision tokens.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    spans: np.ndarray
    image_token_id: int
    tokens_per_placeholder: int


def map_vision(teacher_R8: np.ndarray, student_R8: np.ndarray) -> VisionMap:
    """The map between two layouts (:mod:`alignkd.inputs.regions`) of the same images.

    An image with equal layouts is mapped token by token. So is an image in which one side has no token with coordinates, if
    both sides have the same number of tokens.

    Raises:
        CrossModelError: the numbers of images differ, or tokens without coordinates have to match another number of tokens.
    """
    return _map_vision(np.asarray(teacher_R8, np.float32).tobytes(), np.asarray(student_R8, np.float32).tobytes())


@lru_cache(maxsize=16)
def _map_vision(teacher: bytes, student: bytes) -> VisionMap:
    teacher_R8, student_R8 = (np.frombuffer(x, np.float32).reshape(-1, len(COLUMNS)) for x in (teacher, student))
    images = [sorted(set(regions_R8[:, 0].astype(int).tolist())) for regions_R8 in (teacher_R8, student_R8)]
    if images[0] != images[1]:
        raise CrossModelError(f"the teacher has {len(images[0])} images of this sample, the student {len(images[1])}")
    columns = [np.repeat(regions_R8[:, 0].astype(int), tokens_of(regions_R8)) for regions_R8 in (teacher_R8, student_R8)]
    area = np.zeros((len(columns[0]), len(columns[1])))
    for image in images[0]:
        theirs, ours = (regions_R8[regions_R8[:, 0] == image] for regions_R8 in (teacher_R8, student_R8))
        area[np.ix_(columns[0] == image, columns[1] == image)] = _overlap(image, theirs, ours)
    share, mean = _shares(area).astype(np.float32), _shares(area.T).astype(np.float32)
    known: np.ndarray = area.sum(axis=0) > 0
    for array in (share, mean, known):
        array.setflags(write=False)  # shared by all samples of this layout
    return VisionMap(share, mean, known)


def _overlap(image: int, teacher_R8: np.ndarray, student_R8: np.ndarray) -> np.ndarray:
    """The area that each two tokens of an image have in common, ``[Vt, Vs]``."""
    if np.array_equal(teacher_R8, student_R8):
        return np.eye(int(tokens_of(teacher_R8).sum()))
    (_, theirs), (_, ours) = boxes(teacher_R8), boxes(student_R8)
    if not all(_has_coordinates(box_V4).any() for box_V4 in (theirs, ours)):
        if len(theirs) != len(ours):
            raise CrossModelError(
                f"image {image} is {len(theirs)} vision tokens of the teacher and {len(ours)} of the student, and one side's"
                " have no place in the image to match them by: attention and vision tokens cannot be compared"
            )
        return np.eye(len(ours))
    height, width = (_common(theirs[:, [axis, axis + 2]], ours[:, [axis, axis + 2]]) for axis in (0, 1))
    area: np.ndarray = height * width
    return area


def _has_coordinates(box_V4: np.ndarray) -> np.ndarray:
    found: np.ndarray = (box_V4[:, 2] > box_V4[:, 0]) & (box_V4[:, 3] > box_V4[:, 1])
    return found


def _common(a_N2: np.ndarray, b_M2: np.ndarray) -> np.ndarray:
    """The length that intervals ``[N, 2]`` and ``[M, 2]`` have in common, ``[N, M]``."""
    common = np.minimum(a_N2[:, None, 1], b_M2[None, :, 1]) - np.maximum(a_N2[:, None, 0], b_M2[None, :, 0])
    shorter = np.minimum(a_N2[:, None, 1] - a_N2[:, None, 0], b_M2[None, :, 1] - b_M2[None, :, 0])
    return np.where(common > _TINY * shorter, common, 0.0).clip(min=0.0)


def _shares(area: np.ndarray) -> np.ndarray:
    """Each row divided by its sum; rows of zeros stay."""
    total = area.sum(axis=1, keepdims=True)
    shares: np.ndarray = area / np.where(total > 0, total, 1.0)
    return shares


def map_rows(teacher: Text, student: Text, teacher_regions_R8: np.ndarray, student_regions_R8: np.ndarray) -> RowMap:
    """The map between the text rows of both sides.

    A row has a target where rows of the teacher cover some of its characters and come after the same number of images: a text
    that is before an image in one prompt and after it in the other is no target. Rows of equal ids and spans are mapped one to
    one, those of the template's text included.
    """
    (theirs, images_Tt), (ours, images_Ts) = (
        _text_rows(teacher, teacher_regions_R8),
        _text_rows(student, student_regions_R8),
    )
    spans_Tt2, spans_Ts2 = teacher.spans[theirs], student.spans[ours]
    ids = teacher.input_ids[theirs], student.input_ids[ours]
    if all(np.array_equal(*pair) for pair in (ids, (spans_Tt2, spans_Ts2), (images_Tt, images_Ts))):
        return RowMap(np.eye(len(ours), dtype=np.float32), np.ones(len(ours), dtype=bool))
    common = _common(spans_Ts2.astype(np.float64), spans_Tt2.astype(np.float64))
    common *= images_Ts[:, None] == images_Tt[None, :]
    known: np.ndarray = common.sum(axis=1) > 0
    return RowMap(_shares(common).astype(np.float32), known)


def _text_rows(text: Text, regions_R8: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the ids of the text rows (those after the first image), and how many whole images precede each, ``[T]``."""
    is_image = text.input_ids == text.image_token_id
    rows = np.flatnonzero(is_image.cumsum() * ~is_image)
    tokens_T = is_image.cumsum()[rows] * text.tokens_per_placeholder
    ends = np.cumsum(np.bincount(regions_R8[:, 0].astype(int), weights=tokens_of(regions_R8)))
    return rows, np.searchsorted(ends, tokens_T, side="right")


def pair_answers(teacher: Text, student: Text) -> np.ndarray:
    """For each answer token of the student, the teacher's with the same id over the same characters, ``[As]``; -1 for none.

    An answer token may have none: the end of a turn and white space, which differ between templates; and what the teacher's
    template or maximum length cut from its answers.

    Raises:
        CrossModelError: the teacher splits the same characters into other ids.
    """
    waiting: dict[tuple[int, ...], deque[int]] = defaultdict(deque)
    for answer, key in enumerate(_keys(teacher, _answers(teacher))):
        waiting[key].append(answer)
    known = set(_keys(teacher, np.arange(len(teacher.input_ids))))
    reached = int(teacher.spans[:, 1].max(initial=0))
    found = []
    for key in _keys(student, _answers(student)):
        start, end, token = key
        found.append(waiting[key].popleft() if waiting[key] else -1)
        if found[-1] < 0 and start < end <= reached and key not in known:
            raise CrossModelError(
                f"tokenizer mismatch: the teacher has no id {token} for characters {start} to {end}, as the student has"
            )
    return np.asarray(found, dtype=np.int64)


def _answers(text: Text) -> np.ndarray:
    """Positions of the supervised ids, except a first one, which nothing predicts."""
    return np.flatnonzero(text.labels[1:] != IGNORE) + 1


def _keys(text: Text, positions: np.ndarray) -> list[tuple[int, ...]]:
    return [
        (*span, token) for span, token in zip(text.spans[positions].tolist(), text.input_ids[positions].tolist(), strict=True)
    ]
