"""How words and numbers name layers, and which teacher layer each layer of the student is compared with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkd.losses.layers import check_layers, find_layers, find_teacher_layers, matching_teacher_layer

# --- layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "depth", "expected"),
    [
        ("first", 24, [0]),
        ("last", 24, [23]),
        ("all", 3, [0, 1, 2]),
        ("middle", 24, [*range(8, 15)]),
        ("middle", 40, [*range(13, 24)]),
        ("middle", 2, [0, 1]),
        ("middle", 1, [0]),
        ("last", 1, [0]),
        ("11,0,5", 24, [0, 5, 11]),
        ("7", 8, [7]),
    ],
)
def test_words_and_numbers_name_layers(text, depth, expected):
    assert list(find_layers(text, depth)) == expected


@pytest.mark.parametrize("text", ["", "second", "0,", "-1", "0 1", "1.5", "0;1", "0,0", "0,00", "first,last"])
def test_what_names_no_layers_is_refused_with_what_was_expected(text):
    with pytest.raises(ValueError, match=r"first, last, middle, all, or layers such as|names a layer twice"):
        check_layers(text)


def test_a_layer_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="layer 24 is wanted, but there are 24: 0 to 23"):
        find_layers("0,24", 24)
    with pytest.raises(ValueError, match="number of layers after @, such as middle@24"):
        find_teacher_layers("middle@x", 24)


@given(st.integers(2, 60), st.integers(1, 60))
def test_layers_meet_in_order_the_first_the_first_and_the_last_the_last(depth, teacher_depth):
    met = [matching_teacher_layer(layer, depth, teacher_depth) for layer in range(depth)]
    assert (met[0], met[-1]) == (0, teacher_depth - 1)
    assert met == sorted(met)
    assert all(abs(t - layer * (teacher_depth - 1) / (depth - 1)) <= 0.5 for layer, t in enumerate(met))
    assert matching_teacher_layer(0, 1, teacher_depth) == 0


def test_models_of_one_depth_meet_layer_by_layer():
    assert [matching_teacher_layer(layer, 24, 24) for layer in range(24)] == list(range(24))


@given(st.sampled_from(["first", "last", "middle", "all"]), st.integers(1, 40), st.integers(1, 60))
def test_a_cache_for_a_student_holds_every_layer_that_it_meets_and_no_other(text, depth, teacher_depth):
    held = find_teacher_layers(f"{text}@{depth}", teacher_depth)
    assert set(held) == {matching_teacher_layer(layer, depth, teacher_depth) for layer in find_layers(text, depth)}
