"""Maps between teachers and students of different model families: exact where layouts are equal, by geometry and
characters elsewhere."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from alignkd.inputs.prompts import IGNORE
from alignkd.inputs.regions import region, region_without_coordinates, square_box, stack, tokens_of
from alignkd.targets.cross_model import CrossModelError, Text, map_rows, map_vision, pair_answers

IMAGE = -200


def tokens(regions_R8):
    return int(tokens_of(regions_R8).sum())


# --- vision ------------------------------------------------------------------------------------------------------------

sides = st.integers(1, 4)
edges = st.tuples(st.integers(0, 7), st.integers(1, 8)).map(lambda e: (e[0] / 8, min(e[0] + e[1], 12) / 8))


@st.composite
def layouts(draw, images):
    """Regions over a box, or over nothing, with or without row ends; every image has one with a place."""
    found = []
    for image in range(images):
        for _ in range(draw(st.integers(1, 3))):
            (top, bottom), (left, right) = draw(edges), draw(edges)
            grid = draw(st.tuples(sides, sides))
            found.append(region(image, grid, (top, left, bottom, right), row_ends=draw(st.integers(0, 1))))
        if draw(st.booleans()):
            found.append(region_without_coordinates(image, draw(sides)))
    return stack(found)


pairs = st.integers(1, 2).flatmap(lambda images: st.tuples(layouts(images), layouts(images)))


def slow_boxes(regions_R8):
    """``(image, top, left, bottom, right)`` of every token, cell by cell; None for one without a place."""
    found = []
    for image, rows, columns, ends, top, left, bottom, right in regions_R8.tolist():
        for y in range(int(rows)):
            for x in range(int(columns)):
                height, width = (bottom - top) / rows, (right - left) / columns
                box = (image, top + y * height, left + x * width, top + (y + 1) * height, left + (x + 1) * width)
                found.append(box if height > 0 and width > 0 else None)
            found += [None] * int(ends)
    return found


def slow_overlap(a, b):
    if a is None or b is None or a[0] != b[0]:
        return 0.0
    height, width = min(a[3], b[3]) - max(a[1], b[1]), min(a[4], b[4]) - max(a[2], b[2])
    return height * width if height > 1e-9 and width > 1e-9 else 0.0


@settings(max_examples=50)
@given(pairs)
def test_shares_and_means_are_those_of_the_overlapping_areas(pair):
    teacher, student = pair
    for image in set(teacher[:, 0]):
        assume(not np.array_equal(teacher[teacher[:, 0] == image], student[student[:, 0] == image]))
    area = np.array([[slow_overlap(a, b) for b in slow_boxes(student)] for a in slow_boxes(teacher)])
    found = map_vision(teacher, student)
    assert found.share.shape == (tokens(teacher), tokens(student)) == found.mean.shape[::-1]
    for weights, expected in ((found.share, area), (found.mean, area.T)):
        total = expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(weights, np.divide(expected, total, where=total > 0, out=np.zeros_like(expected)), atol=1e-5)
    np.testing.assert_array_equal(found.known, area.any(axis=0))


@given(pairs)
def test_attention_keeps_its_mass_where_the_student_sees_anything_at_all(pair):
    found = map_vision(*pair)
    mass = found.share.sum(axis=1)
    np.testing.assert_allclose(mass, (found.share > 0).any(axis=1), atol=1e-5)
    rng = np.random.default_rng(0)
    attention = rng.random((3, len(mass)), np.float32)
    np.testing.assert_allclose((attention @ found.share).sum(axis=1), attention @ mass, rtol=1e-4)
    assert (found.share[:, ~found.known] == 0).all()


@given(pairs)
def test_equal_vision_tokens_stay_what_they_are(pair):
    found = map_vision(*pair)
    constant = np.full((found.mean.shape[1], 2), 0.75, np.float32)
    np.testing.assert_allclose(found.mean @ constant, np.outer(found.known, [0.75, 0.75]), atol=1e-5)


@given(st.integers(0, 2).flatmap(layouts))
def test_equal_layouts_are_the_identity_to_the_bit_separators_too(regions_R8):
    found = map_vision(regions_R8, regions_R8.copy())
    for weights in (found.share, found.mean):
        np.testing.assert_array_equal(weights, np.eye(tokens(regions_R8), dtype=np.float32))
    assert found.known.all()


@pytest.mark.parametrize("box", [(0, 0, 1, 1), square_box((640, 480), "pad"), square_box((333, 500), "crop")])
def test_24_by_24_into_12_by_12_sums_blocks_of_four_exactly(box):
    found = map_vision(stack([region(0, (24, 24), box)]), stack([region(0, (12, 12), box)]))
    expected = np.kron(np.eye(144).reshape(12, 12, 144), np.ones((2, 2, 1))).reshape(576, 144)
    np.testing.assert_array_equal(found.share, expected)
    np.testing.assert_allclose(found.mean, expected.T / 4, rtol=1e-6)


def test_each_image_is_mapped_to_itself_alone():
    teacher, student = stack([region(0, (2, 2)), region(1, (2, 2))]), stack([region(0, (1, 1)), region(1, (2, 1))])
    expected = [[1, 0, 0]] * 4 + [[0, 1, 0]] * 2 + [[0, 0, 1]] * 2
    np.testing.assert_array_equal(map_vision(teacher, student).share, expected)


def test_a_student_that_pads_learns_nothing_where_a_teacher_that_crops_did_not_look():
    """A wide image of 2 x 1: the crop is its middle half, the padded square reaches half its height over both borders."""
    teacher = stack([region(0, (1, 1), square_box((200, 100), "crop"))])
    student = stack([region(0, (4, 4), square_box((200, 100), "pad"))])
    found = map_vision(teacher, student)
    grid = found.known.reshape(4, 4)
    np.testing.assert_array_equal(grid, [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(found.share.reshape(4, 4), grid / 4)


def test_a_tile_and_a_thumbnail_over_the_same_place_share_its_attention_by_area():
    student = stack([region(0, (1, 1)), region(0, (1, 1), (0, 0, 0.5, 0.5), row_ends=1)])
    np.testing.assert_allclose(map_vision(stack([region(0, (1, 1))]), student).share, [[0.8, 0.2, 0.0]])


def test_tokens_without_a_place_are_matched_one_by_one_or_not_at_all():
    queries, grid = stack([region_without_coordinates(0, 4)]), stack([region(0, (2, 2))])
    for teacher, student in ((queries, grid), (grid, queries), (queries, stack([region_without_coordinates(0, 4)]))):
        np.testing.assert_array_equal(map_vision(teacher, student).share, np.eye(4))
    with pytest.raises(CrossModelError, match=r"image 0 is 4 vision tokens of the teacher and 9 of the student.*no place"):
        map_vision(queries, stack([region(0, (3, 3))]))


def test_other_images_are_refused():
    with pytest.raises(CrossModelError, match="the teacher has 2 images of this sample, the student 1"):
        map_vision(stack([region(0, (1, 1)), region(1, (1, 1))]), stack([region(0, (1, 1))]))


# --- text --------------------------------------------------------------------------------------------------------------

GRID = stack([region(0, (2, 2)), region(1, (2, 2))])


def text(*parts, labels=None):
    """``(id, start, end)`` each; ``IMAGE`` for an image, which stands for four vision tokens."""
    ids = [part if part == IMAGE else part[0] for part in parts]
    spans, place = [], 0
    for part in parts:
        spans.append((place, place) if part == IMAGE else part[1:])
        place = spans[-1][1]
    ids, spans = np.array(ids), np.array(spans)
    return Text(ids, np.full_like(ids, IGNORE) if labels is None else np.array(labels), spans, IMAGE, 4)


def test_a_row_is_the_mean_of_the_teachers_rows_over_its_characters():
    teacher = text(IMAGE, (5, 0, 3), (6, 3, 4), (7, 4, 8), (8, 8, 8))
    student = text(IMAGE, (9, 0, 0), (1, 0, 4), (2, 4, 5), (3, 5, 8), (4, 8, 9), (2, 9, 9))
    found = map_rows(teacher, student, GRID[:1], GRID[:1])
    expected = [[0, 0, 0, 0], [0.75, 0.25, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(found.mean, expected)
    np.testing.assert_array_equal(found.known, [False, True, True, True, False, False])


def test_bytes_of_one_character_all_have_its_row():
    teacher = text(IMAGE, (5, 0, 1), (6, 1, 2))
    student = text(IMAGE, (1, 0, 1), (2, 0, 1), (3, 1, 2))
    np.testing.assert_allclose(map_rows(teacher, student, GRID[:1], GRID[:1]).mean, [[1, 0], [1, 0], [0, 1]])


def test_equal_ids_map_row_by_row_the_templates_own_text_too():
    both = (IMAGE, (5, 0, 0), (6, 0, 2), (7, 2, 2), (6, 2, 4))
    found = map_rows(text(*both), text(*both), GRID[:1], stack([region(0, (1, 4))]))
    np.testing.assert_array_equal(found.mean, np.eye(4))
    assert found.known.all()


def test_text_before_an_image_in_one_prompt_and_after_it_in_the_other_has_no_target():
    teacher = text((5, 0, 2), IMAGE, (6, 2, 4), IMAGE, (7, 4, 6))
    student = text(IMAGE, IMAGE, (1, 0, 2), (2, 2, 4), (3, 4, 6))
    found = map_rows(teacher, student, GRID, GRID)
    np.testing.assert_array_equal(found.known, [False, False, True])
    np.testing.assert_array_equal(found.mean[2], [0, 1])
    back = map_rows(student, teacher, GRID, GRID)
    np.testing.assert_array_equal(back.known, [False, True])


cuts = st.lists(st.integers(1, 4), min_size=1, max_size=8)


@given(cuts, cuts)
def test_rows_keep_their_order_and_their_weights_sum_to_one(theirs, ours):
    def cut(lengths):
        ends = np.cumsum(lengths)
        return text(IMAGE, *((i, int(end - n), int(end)) for i, (n, end) in enumerate(zip(lengths, ends, strict=True))))

    found = map_rows(cut(theirs), cut(ours), GRID[:1], GRID[:1])
    np.testing.assert_allclose(found.mean.sum(axis=1), found.known, atol=1e-6)
    places = [(row > 0).nonzero()[0] for row in found.mean[found.known]]
    assert all(a.max() <= b.min() for a, b in pairwise(places))
    starts = np.cumsum(ours) - ours
    np.testing.assert_array_equal(found.known, starts < sum(theirs))


# --- answers -----------------------------------------------------------------------------------------------------------

END, OTHER_END, LINE = 90, 91, 92


def answered(*parts):
    """A question of two characters, then supervised ``parts``."""
    return text((1, 0, 2), *parts, labels=[IGNORE, *(part[0] for part in parts)])


def test_answers_of_equal_ids_and_characters_are_pairs_and_the_ends_of_turns_too():
    teacher, student = (
        answered((5, 2, 4), (6, 4, 5), (END, 5, 5)),
        text((7, 0, 0), (1, 0, 2), (8, 2, 2), (5, 2, 4), (6, 4, 5), (END, 5, 5), labels=[IGNORE] * 3 + [5, 6, END]),
    )
    np.testing.assert_array_equal(pair_answers(teacher, student), [0, 1, 2])
    np.testing.assert_array_equal(pair_answers(student, teacher), [0, 1, 2])


def test_another_end_of_a_turn_has_no_target_and_shifts_nothing():
    teacher = answered((5, 2, 4), (OTHER_END, 4, 4), (5, 4, 6), (OTHER_END, 6, 6))
    student = answered((5, 2, 4), (END, 4, 4), (5, 4, 6), (END, 6, 6))
    np.testing.assert_array_equal(pair_answers(teacher, student), [0, -1, 2, -1])


def test_repeated_white_space_is_paired_in_order():
    teacher = answered((5, 2, 4), (LINE, 4, 4), (LINE, 4, 4), (6, 4, 5))
    student = answered((5, 2, 4), (LINE, 4, 4), (LINE, 4, 4), (LINE, 4, 4), (6, 4, 5))
    np.testing.assert_array_equal(pair_answers(teacher, student), [0, 1, 2, -1, 3])


def test_what_the_teachers_length_or_labels_left_out_has_no_target():
    student = answered((5, 2, 4), (6, 4, 5), (7, 5, 8))
    np.testing.assert_array_equal(pair_answers(answered((5, 2, 4), (6, 4, 5)), student), [0, 1, -1])
    unlabelled = text((1, 0, 2), (5, 2, 4), (6, 4, 5), (7, 5, 8), labels=[IGNORE, IGNORE, 6, 7])
    np.testing.assert_array_equal(pair_answers(unlabelled, student), [-1, 0, 1])


def test_an_answer_split_otherwise_is_refused():
    with pytest.raises(CrossModelError, match="tokenizer mismatch: the teacher has no id 7 for characters 2 to 5"):
        pair_answers(answered((5, 2, 4), (6, 4, 5)), answered((7, 2, 5)))
