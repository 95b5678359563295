"""Recipes: by name, from a file, overridden; and every wrong value refused by name."""

from __future__ import annotations

import contextlib
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkd.losses.recipes import RECIPES, Recipe, get_recipe, one_term_recipes, recipe_record, term_weights
from alignkd.pipeline.commands.distill import distill_command


@pytest.fixture
def write(tmp_path):
    def write_(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write_


def test_a_recipe_is_found_by_its_name():
    relatives = {"llavadi-forward", "llavadi-reverse", "llavadi-js", "compodistill", "beta-kd", "visual-advantage"}
    assert set(RECIPES) == {"align-kd", "paper", "sft", "logits-only", "teacher-projector", *relatives}
    assert all(get_recipe(name) is not None and get_recipe(name) == recipe for name, recipe in RECIPES.items())


def test_a_file_starts_from_its_base_and_is_called_by_its_file_name(write):
    recipe = get_recipe(write("base: align-kd\nattention: 0.5\nfocus_k: 4\n"))
    assert recipe == Recipe("mine", reverse_kl=1.0, attention=0.5, vision=1.0, focus_k=4)


def test_a_file_without_base_starts_from_the_defaults(write):
    assert get_recipe(write("name: other\nvision: 2\n", "x.yml")) == Recipe("other", vision=2.0)


def test_overrides_win_over_name_and_file(write):
    assert get_recipe("sft", {"reverse_kl": "2", "normalise": "false", "head_map": "mean"}) == Recipe(
        "sft", reverse_kl=2.0, normalise=False, head_map="mean"
    )
    assert get_recipe(write("base: align-kd\nattention: 0.5\n"), {"attention": "0.25"}).attention == 0.25


@pytest.mark.parametrize("text", ["0.01", "1e-2", "1.0e-2", ".01"])
def test_a_weight_may_be_written_in_any_usual_form(write, text):
    assert get_recipe("sft", {"attention": text}).attention == 0.01
    assert get_recipe(write(f"attention: {text}")).attention == 0.01


def test_a_described_recipe_read_back_is_the_same_recipe(write):
    import yaml

    for recipe in RECIPES.values():
        assert get_recipe(write(yaml.safe_dump(recipe_record(recipe)))) == recipe
        later = {"projector"} if recipe.projector == "own" else set()
        assert set(recipe_record(recipe)) == {f.name for f in fields(Recipe)} - {"extra"} - later


WRONG = [
    ("supervised", "-1", "0 or more"),
    ("reverse_kl", "-0.5", "0 or more"),
    ("forward_kl", "-1", "0 or more"),
    ("jensen_shannon", ".nan", "0 or more"),
    ("attention", ".nan", "0 or more"),
    ("attention", ".inf", "weight|finite"),
    ("vision", "much", "expected float"),
    ("vision", "true", "expected float"),
    ("vision_focus", "[1]", "expected float"),
    ("vision_focus", "null", "expected float"),
    ("temperature", "0", "more than 0"),
    ("temperature", "-1", "more than 0"),
    ("temperature", ".nan", "more than 0"),
    ("focus_k", "0", "1 or more"),
    ("focus_k", "1.5", "expected int"),
    ("focus_k", "true", "expected int"),
    ("normalise", "1", "expected bool"),
    ("normalise", "perhaps", "expected bool"),
    ("head_map", "magic", "mixture, convolution, mean"),
    ("head_map", "3", "expected str"),
    ("width_map", "magic", "lift, isometry, projection"),
    ("attention_distance", "l1", "mse, kl, cosine"),
    ("attention_rows", "all", "text, answer, instruction"),
    ("attention_layers", "second", "first, last, middle, all, or layers such as 0,5,11"),
    ("attention_layers", "[0, -1]", "expected first, last"),
    ("attention_layers", "[]", "expected first, last"),
    ("attention_layers", "1.5", "expected first, last"),
    ("attention_layers", "true", "expected first, last"),
    ("attention_layers", "0,0", "names a layer twice"),
    ("weighting", "free", "fixed, learned"),
    ("token_weighting", "entropy", "uniform, advantage"),
    ("token_top_share", "0", "above 0 and below 1"),
    ("token_top_share", "1", "above 0 and below 1"),
    ("token_lambda", "1.5", "0 to 1"),
    ("token_lambda", ".nan", "0 to 1"),
    ("projector", "theirs", "own, teacher"),
    ("weighting_learning_rate", "0", "more than 0"),
    ("name", "3", "expected str"),
]


@pytest.mark.parametrize(("field", "text", "expectation"), WRONG)
def test_a_wrong_value_is_refused_with_its_field_and_what_was_expected(write, field, text, expectation):
    for make in (lambda: get_recipe("align-kd", {field: text}), lambda: get_recipe(write(f"{field}: {text}\n"))):
        with pytest.raises(ValueError, match=expectation) as error:
            make()
        assert field in str(error.value)


def test_every_field_has_a_wrong_value_above():
    assert {field for field, _, _ in WRONG} == {f.name for f in fields(Recipe)} - {"extra"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("last", "last"), ("middle", "middle"), ("5", "5"), ("0,5,11", "0,5,11"), ("[0, 5, 11]", "0,5,11"), ("0, 5", "0,5")],
)
def test_layers_may_be_words_a_number_or_a_list(write, text, expected):
    assert get_recipe("align-kd", {"attention_layers": text}).attention_layers == expected
    assert get_recipe(write(f"attention_layers: {text}\n")).attention_layers == expected


def test_a_head_map_that_gives_no_distributions_is_refused_where_distributions_are_compared():
    with pytest.raises(ValueError, match=r"attention_distance kl compares distributions.*mixture or mean"):
        get_recipe("paper", {"attention_distance": "kl"})


def test_a_vision_term_that_is_zero_by_construction_is_refused():
    with pytest.raises(ValueError, match=r"vision is 1\.0 with projector teacher.*set vision to 0"):
        get_recipe("align-kd", {"projector": "teacher"})


def test_help_and_the_page_of_the_method_name_every_recipe():
    (option,) = (p for p in distill_command.params if p.name == "recipe")
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    for name in RECIPES:
        assert name in option.help
        assert f"`{name}`" in page
    for field in fields(Recipe):
        assert field.name == "name" or f"`{field.name}`" in page


def test_what_the_recipes_after_other_papers_compare():
    assert [RECIPES[f"llavadi-{x}"].divergences for x in ("forward", "reverse", "js")] == [
        ("forward_kl",),
        ("reverse_kl",),
        ("jensen_shannon",),
    ]
    assert all(RECIPES[f"llavadi-{x}"].needs == {"logits"} for x in ("forward", "reverse", "js"))
    assert RECIPES["compodistill"].needs == {"attention", "logits"}
    assert RECIPES["beta-kd"] == Recipe("beta-kd", reverse_kl=1.0, attention=0.1, vision=1.0, weighting="learned")


def test_an_unknown_field_is_refused_with_the_known_ones(write):
    for make in (lambda: get_recipe("sft", {"atention": "1"}), lambda: get_recipe(write("atention: 1\n"))):
        with pytest.raises(ValueError, match=r"'atention' is no field of a recipe; known are .*attention"):
            make()


def test_an_unknown_recipe_or_base_is_refused_with_the_known_ones(write):
    with pytest.raises(ValueError, match="'kd' is not known; known are align-kd"):
        get_recipe("kd")
    with pytest.raises(ValueError, match="base is 'kd'; known are align-kd"):
        get_recipe(write("base: kd\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("attention: [1", "not YAML"), ("- 1\n- 2\n", "holds a list"), ("just words", "holds a str"), ("", "holds a NoneType")],
)
def test_a_file_that_is_no_recipe_is_refused(write, text, message):
    with pytest.raises(ValueError, match=message):
        get_recipe(write(text))


def test_a_base_that_is_no_name_is_refused(write):
    with pytest.raises(ValueError, match="base"):
        get_recipe(write("base: [align-kd]\n"))


def test_an_override_that_is_not_yaml_is_refused_with_its_field():
    with pytest.raises(ValueError, match="attention"):
        get_recipe("sft", {"attention": "[1"})


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml"):
        get_recipe(str(tmp_path / "none.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ValueError, match=r"folder\.yaml"):
        get_recipe(str(tmp_path / "folder.yaml"))


@given(st.binary(max_size=30))
def test_any_bytes_are_a_recipe_or_a_value_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bytes") / "x.yaml"
    path.write_bytes(data)
    with contextlib.suppress(ValueError):
        assert isinstance(get_recipe(str(path)), Recipe)


def test_a_file_cannot_run_code(write, tmp_path):
    with pytest.raises(ValueError, match="YAML"):
        get_recipe(write(f"name: !!python/object/apply:os.mkdir ['{tmp_path}/ran']\n"))
    assert not (tmp_path / "ran").exists()


# --- one term alone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [*RECIPES.values(), Recipe("mine", supervised=0.3, jensen_shannon=2.0, vision=0.7)])
def test_a_recipe_of_one_term_has_its_weight_and_no_other(recipe):
    weights = term_weights(recipe)
    found = one_term_recipes(recipe)
    assert set(found) == {name for name, weight in weights.items() if weight > 0}
    for term, alone in found.items():
        own = term_weights(alone)
        assert own.pop(term) == weights[term]
        assert all(weight <= 1e-12 for weight in own.values())
        assert all(weight == 0 for name, weight in own.items() if (term, name) != ("vision_focus", "vision_all"))


def test_a_recipe_of_one_term_keeps_every_setting_that_is_no_weight():
    recipe = Recipe("mine", attention=1.0, vision=1.0, focus_k=3, temperature=2.0, normalise=False, head_map="mean")
    recipe = replace(recipe, attention_distance="kl", attention_rows="answer", attention_layers="last", weighting="learned")
    for term, alone in one_term_recipes(recipe).items():
        for name in (
            *("focus_k", "temperature", "normalise", "head_map", "width_map"),
            *("attention_distance", "attention_rows", "attention_layers", "weighting"),
        ):
            assert getattr(alone, name) == getattr(recipe, name)
        assert alone.name == f"mine: {term} alone"


def test_a_recipe_of_one_term_needs_no_more_than_the_whole():
    recipe = RECIPES["align-kd"]
    needs = {term: set(alone.needs) for term, alone in one_term_recipes(recipe).items()}
    assert needs == {
        "supervised": set(),
        "reverse_kl": {"logits"},
        "attention": {"attention"},
        "vision_all": {"vision"},
        "vision_focus": {"vision", "attention"},
    }


def test_a_recipe_without_any_term_has_none_alone():
    assert one_term_recipes(Recipe(supervised=0.0)) == {}
