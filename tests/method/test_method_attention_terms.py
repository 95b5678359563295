"""Attention terms beyond the paper's: distances, rows, layers, and learned weights of terms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from exact_logits import ExactTopK, exact_answers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import IMAGE, batch_of, flat, mixture, sample, write_checkpoint

from alignkd.capture.attention import capture
from alignkd.capture.layer_pairs import needed_layers
from alignkd.capture.online_teacher import OnlineTeacher
from alignkd.inputs.batch import Counts
from alignkd.inputs.prompts import IGNORE
from alignkd.losses.attention_distance import attention_distance, chosen_rows
from alignkd.losses.layers import check_layers, find_layers, find_teacher_layers, matching_teacher_layer
from alignkd.losses.learned_weights import LearnedWeights, learned_part
from alignkd.losses.recipes import RECIPES, Recipe, one_term_recipes, term_weights
from alignkd.models.loading import load_vlm
from alignkd.objective import Objective, TeacherShape
from alignkd.targets.batch_targets import Targets

DISTANCES = ("mse", "kl", "cosine")


def maps(seed, *, samples=2, heads=3, rows=4, columns=6, dtype=torch.float64):
    """Attention of text rows to some columns of a longer row, ``[B, H, T, V]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, heads, rows, columns + 3, generator=generator, dtype=dtype).mul(2).softmax(3)[..., :columns]


def whole(attention):
    samples, _, rows, columns = attention.shape
    return torch.ones(samples, rows, dtype=torch.bool), torch.ones(samples, columns, dtype=torch.bool)


def distance_of(student, teacher, kind, masks=None, **kwargs):
    return attention_distance(student, teacher, *(masks or whole(student)), kind, **{"relative_to_uniform": False, **kwargs})


# --- distances ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", DISTANCES)
def test_a_distance_is_zero_for_equal_attention_and_positive_for_other(kind, dtype):
    one, other = maps(0, dtype=dtype), maps(1, dtype=dtype)
    student = one.clone().requires_grad_()
    same = distance_of(student, one, kind)
    same.sum().backward()
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-6)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-6)
    assert (distance_of(one, other, kind) > 1e-4).all()


@pytest.mark.parametrize("kind", DISTANCES)
def test_the_gradient_of_a_distance_is_right_for_student_and_mapped_teacher(kind):
    student, teacher = maps(2).requires_grad_(), maps(3).requires_grad_()
    masks = torch.tensor([[True, True, False, True], [True] * 4]), torch.tensor([[True] * 6, [True] * 5 + [False]])
    assert torch.autograd.gradcheck(lambda s, t: distance_of(s, t, kind, masks, relative_to_uniform=True), (student, teacher))


def by_hand(student, teacher, rows, columns, kind):
    """One sample's distance, number by number."""
    values = []
    for h in range(student.shape[0]):
        for t in (t for t, chosen in enumerate(rows) if chosen):
            s_row = [float(student[h, t, v]) for v, shown in enumerate(columns) if shown]
            t_row = [float(teacher[h, t, v]) for v, shown in enumerate(columns) if shown]
            if kind == "kl":
                q, p = [x / sum(s_row) for x in s_row], [x / sum(t_row) for x in t_row]
                values.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0))
            else:
                product = sum(x * y for x, y in zip(s_row, t_row, strict=True))
                lengths = math.sqrt(sum(x * x for x in s_row)) * math.sqrt(sum(x * x for x in t_row))
                values.append(1 - product / lengths)
    return sum(values) / len(values) if values else 0.0


MASK = st.lists(st.booleans(), min_size=4, max_size=4)


@settings(max_examples=40)
@given(st.lists(MASK, min_size=2, max_size=2), st.integers(0, 999), st.sampled_from(["kl", "cosine"]))
def test_kl_and_cosine_are_what_a_loop_over_chosen_rows_gives(rows, seed, kind):
    student, teacher = maps(seed), maps(seed + 1)
    columns = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = distance_of(student, teacher, kind, (torch.tensor(rows), columns))
    expected = [by_hand(student[i], teacher[i], rows[i], columns[i].tolist(), kind) for i in range(2)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["kl", "cosine"])
@pytest.mark.parametrize("size", [1e-3, 1e-12])
def test_kl_and_cosine_compare_where_a_row_looks_and_not_how_much_of_it(kind, size):
    student, teacher = maps(4, dtype=torch.float32), maps(5, dtype=torch.float32)
    expected = distance_of(student, teacher, kind)
    torch.testing.assert_close(distance_of(student * size, teacher, kind), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(distance_of(student, teacher * size, kind), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(distance_of(student, teacher, kind, relative_to_uniform=True), expected)


@pytest.mark.parametrize("kind", ["kl", "cosine"])
def test_a_teachers_row_without_any_attention_to_the_image_says_nothing(kind):
    student, teacher = maps(6, dtype=torch.float32).requires_grad_(), maps(7, dtype=torch.float32)
    teacher[:, :, 2] = 0
    found = distance_of(student, teacher, kind)
    found.sum().backward()
    assert found.isfinite().all()
    assert (student.grad[:, :, 2] == 0).all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["kl", "cosine"])
@pytest.mark.parametrize("tiny_value", [0.0, 1e-40, 1e-35])
def test_probabilities_that_underflow_leave_loss_and_gradient_finite(kind, tiny_value):
    student, teacher = maps(8, dtype=torch.float32), maps(9, dtype=torch.float32)
    student[:, :, 1] = tiny_value
    student[:, :, 2, 0], teacher[:, :, 3, 1] = tiny_value, tiny_value
    student.requires_grad_()
    found = distance_of(student, teacher, kind)
    (10 * found.sum()).backward()
    assert (found > 0).all()
    assert found.isfinite().all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("rows", ["text", "answer", "instruction"])
@pytest.mark.parametrize("kind", DISTANCES)
def test_a_distance_does_not_depend_on_padding_or_neighbours(tiny, kind, rows):
    samples = mixture(tiny)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        together = batch_of(tiny, samples)
        attention = capture(tiny, together).attention[0]
        teacher = attention * torch.rand(attention.shape, generator=generator)
        found = distance_of(attention, teacher, kind, (chosen_rows(together, rows), together.vision_mask_BV))
        for i, one in enumerate(samples):
            alone = batch_of(tiny, [one])
            shape = alone.text_rows_BT.shape[1], alone.vision_columns_BV.shape[1]
            cut = [x[i : i + 1, :, : shape[0], : shape[1]] for x in (attention, teacher)]
            expected = distance_of(*cut, kind, (chosen_rows(alone, rows), alone.vision_mask_BV))
            torch.testing.assert_close(found[i], expected[0], rtol=1e-4, atol=1e-6)
    assert found.isfinite().all()
    assert found[2] == 0  # it has no image


# --- rows --------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.one_of(st.integers(3, 500), st.just(IMAGE)), st.booleans()), min_size=1, max_size=9))
def test_answer_rows_predict_a_supervised_token_and_instruction_rows_are_the_others(tiny_vlm, tokens):
    ids = [1, *(token for token, _ in tokens)]
    one = sample(tiny_vlm, ids, answers=0)
    labels = [IGNORE, *(token if wanted and token != IMAGE else IGNORE for token, wanted in tokens)]
    one = replace(one, labels=torch.tensor(labels).numpy())
    batch = batch_of(tiny_vlm, [one, sample(tiny_vlm, [1, IMAGE, 5, 6, 7], answers=2)])
    long_ids, long_labels = [], []
    for token, label in zip(ids, labels, strict=True):
        repeats = 4 if token == IMAGE else 1
        long_ids += [token] * repeats
        long_labels += [label] * repeats
    first = long_ids.index(IMAGE) if IMAGE in long_ids else len(long_ids)
    text = [i for i, token in enumerate(long_ids) if token != IMAGE and i > first]
    predicting = [i for i in text if i + 1 < len(long_ids) and long_labels[i + 1] != IGNORE]
    for rows, expected in (("text", text), ("answer", predicting), ("instruction", [i for i in text if i not in predicting])):
        assert batch.text_rows_BT[0][chosen_rows(batch, rows)[0]].tolist() == expected
    # The other sample has rows 5, 6, 7 after four vision tokens: those before 6 and 7 predict.
    assert batch.text_rows_BT[1][chosen_rows(batch, "answer")[1]].tolist() == [5, 6]


@pytest.fixture(scope="module")
def tiny_vlm(tiny_folder):
    return load_vlm(tiny_folder)


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


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Three layers, eight heads, wider than the tiny student of two layers."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    write_checkpoint(folder, seed=1, hidden_size=32, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=3)
    return load_vlm(folder)


def eager_layers(vlm, one):
    """Attention ``[H, T, V]`` of every layer of one sample by the eager kernel."""
    batch = batch_of(vlm, [one])
    before = vlm.model.config.text_config._attn_implementation
    vlm.model.set_attn_implementation({"text_config": "eager"})
    try:
        output = vlm.model(input_ids=batch.input_ids_BS, pixel_values=one.images, output_attentions=True, use_cache=False)
    finally:
        vlm.model.set_attn_implementation({"text_config": before})
    return [a[0][:, batch.text_rows_BT[0]][:, :, batch.vision_columns_BV[0]] for a in output.attentions]


@pytest.mark.parametrize("layers", [(0, 1, 2), (2,), (1, 2)])
def test_captured_layers_equal_those_of_the_eager_kernel(deep, layers):
    samples = mixture(deep)
    batch = batch_of(deep, samples)
    with torch.no_grad():
        captured = capture(deep, batch, layers=layers)
        assert set(captured.attention) == set(layers)
        for i, one in enumerate(samples):
            if not len(one.images):
                continue
            rows, columns = batch.text_mask_BT[i].sum(), batch.vision_mask_BV[i].sum()
            expected = eager_layers(deep, one)
            for layer in layers:
                found = captured.attention[layer][i, :, :rows, :columns]
                torch.testing.assert_close(found, expected[layer], rtol=0, atol=1e-5)


def test_more_layers_change_neither_the_first_nor_anything_else(deep):
    batch = batch_of(deep, mixture(deep))
    with torch.no_grad():
        one, more = capture(deep, batch), capture(deep, batch, layers=(0, 1, 2))
    assert torch.equal(one.attention[0], more.attention[0])
    assert torch.equal(one.hidden_AD, more.hidden_AD)
    assert set(one.attention) == {0}


def test_a_layer_that_is_not_there_cannot_be_captured(deep):
    with pytest.raises(ValueError, match="no attention of layer 3 can be captured"), torch.no_grad():
        capture(deep, batch_of(deep, mixture(deep)), layers=(0, 3))


def test_a_later_layer_sends_gradients_to_its_own_queries_and_to_all_before(deep):
    layers = deep.decoder.layers
    deep.model.zero_grad()
    capture(deep, batch_of(deep, mixture(deep)), layers=(1,)).attention[1].square().sum().backward()
    assert layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert layers[0].mlp.down_proj.weight.grad.abs().sum() > 0
    assert layers[1].self_attn.o_proj.weight.grad is None
    assert layers[2].self_attn.q_proj.weight.grad is None
    deep.model.zero_grad()


# --- the term ----------------------------------------------------------------------------------------------------------


def targets_of(teacher, batch):
    with torch.no_grad():
        captured = capture(teacher, batch, layers=range(teacher.layers))
    answers = exact_answers(teacher, captured.hidden_AD, 20)
    return Targets(captured.attention, captured.vision_BVD, answers)


def shape_of(teacher):
    return TeacherShape(teacher.heads, teacher.hidden_size, teacher.layers)


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("rows", ["text", "answer", "instruction"])
def test_the_term_of_several_layers_is_the_mean_of_theirs(tiny, deep, kind, rows):
    batch = batch_of(tiny, mixture(tiny))
    targets = targets_of(deep, batch)
    recipe = Recipe("one", supervised=0, attention=1, attention_distance=kind, attention_rows=rows, attention_layers="all")
    objective = Objective(tiny, recipe, shape_of(deep))
    assert objective.layer_pairs == ((0, 0), (1, 2))
    found = flat(objective(batch, targets))["attention"]
    with torch.no_grad():
        student = capture(tiny, batch, layers=(0, 1)).attention
        expected = [
            distance_of(
                student[layer],
                objective.head_map(targets.attention[teacher_layer]),
                kind,
                (chosen_rows(batch, rows), batch.vision_mask_BV),
                relative_to_uniform=True,
            ).sum()
            / 5  # samples with text after an image
            for layer, teacher_layer in objective.layer_pairs
        ]
    torch.testing.assert_close(found, sum(expected) / 2, rtol=1e-4, atol=1e-6)
    assert found > 0


def test_recomputed_activations_give_the_same_loss_and_gradients_of_every_layer(tiny, deep):
    batch = batch_of(tiny, mixture(tiny))
    targets, gradients, losses = targets_of(deep, batch), [], []
    objective = Objective(tiny, Recipe("one", supervised=0, attention=1, attention_layers="all"), shape_of(deep))
    objective.train()
    parameters = [p for p in objective.parameters() if p.requires_grad]
    for recomputes in (False, True):
        if recomputes:
            objective.recompute_activations()
        losses.append(objective(batch, targets)["loss"])
        gradients.append(torch.autograd.grad(losses[-1], parameters, allow_unused=True))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        if plain is not None:
            torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)
    assert sum(plain.abs().sum() for plain in gradients[0] if plain is not None) > 0


def test_each_layer_trains_a_head_map_of_its_own_and_the_first_keeps_its_name(tiny, deep):
    batch = batch_of(tiny, mixture(tiny))
    objective = Objective(tiny, Recipe("one", supervised=0, attention=1, attention_layers="0,1"), shape_of(deep))
    objective(batch, targets_of(deep, batch))["loss"].backward()
    moved = {name for name, p in objective.named_parameters() if "head_map" in name and p.grad.abs().sum() > 0}
    assert moved == {"head_map.logits", "other_head_maps.0.logits"}


def test_a_recipe_names_the_teachers_layers_that_it_needs(tiny):
    def needed(**fields):
        return needed_layers(Recipe("one", **fields), tiny, 5)

    assert needed(attention=1.0) == (0,)
    assert needed(attention=1.0, attention_layers="last") == (4,)
    assert needed(attention=1.0, attention_layers="last", vision=1.0) == (0, 4)
    assert needed(attention=1.0, attention_layers="all") == (0, 4)
    assert needed(vision=1.0, attention_layers="all") == (0,)
    assert needed(vision=1.0, vision_focus=0.0) == ()
    with pytest.raises(ValueError, match="attention_layers of the student: layer 7 is wanted, but there are 2"):
        needed(attention=1.0, attention_layers="7")


def test_the_focus_wants_the_first_layer_whatever_layer_is_compared(tiny, deep):
    batch = batch_of(tiny, mixture(tiny))
    targets = targets_of(deep, batch)
    terms = [
        flat(
            Objective(tiny, Recipe("one", attention=1, vision=1, focus_k=2, attention_layers=x), shape_of(deep))(batch, targets)
        )
        for x in ("first", "last")
    ]
    torch.manual_seed(0)
    assert terms[0]["attention"] != terms[1]["attention"]
    assert all(t["vision_focus"].isfinite() for t in terms)


def test_an_online_teacher_gives_the_layers_that_it_is_asked_for(tiny, deep):
    batch = batch_of(tiny, mixture(tiny))
    expected = targets_of(deep, batch)
    source = OnlineTeacher(deep, tiny, attention_layers=(1, 2))
    _, found = source.fill(tiny, batch, Targets(), frozenset({"attention"}))
    assert set(found.attention) == {1, 2}
    for layer in (1, 2):
        torch.testing.assert_close(found.attention[layer], expected.attention[layer])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_finite_loss_and_gradient_also_without_any_image(tiny, deep, name):
    objective = Objective(tiny, RECIPES[name], shape_of(deep), logit_codec=ExactTopK())
    for samples in (mixture(tiny), [sample(tiny, [1, 5, 6, 7, 8])]):
        objective.zero_grad()
        batch = batch_of(tiny, samples)
        outcome = objective(batch, targets_of(deep, batch))
        outcome["loss"].backward()
        assert outcome["loss"].isfinite()
        assert not outcome["bad_B"].any()
        assert set(outcome["terms"]) == {term for term, weight in term_weights(RECIPES[name]).items() if weight > 0}
        assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


# --- learned weights ---------------------------------------------------------------------------------------------------

BETA = RECIPES["beta-kd"]


def learned(tiny, deep, recipe=BETA, raw=None):
    torch.manual_seed(0)
    objective = Objective(tiny, recipe, shape_of(deep), logit_codec=ExactTopK())
    if raw is not None:
        with torch.no_grad():
            objective.learned_weights.log_variances.copy_(torch.tensor(raw))
    return objective


def test_learned_weights_begin_as_the_recipe_itself(tiny, deep):
    batch = batch_of(tiny, mixture(tiny))
    targets = targets_of(deep, batch)
    fixed = learned(tiny, deep, replace(BETA, weighting="fixed"))(batch, targets)
    found = learned(tiny, deep)(batch, targets)
    torch.testing.assert_close(found["loss"], fixed["loss"])
    assert set(found["precisions"]) == set(found["terms"])
    assert all(precision == 1 for precision in found["precisions"].values())
    assert fixed["precisions"] == {}


def test_loss_and_every_gradient_are_those_of_the_formula(tiny, deep):
    batch = batch_of(tiny, mixture(tiny))
    targets = targets_of(deep, batch)
    objective = learned(tiny, deep, raw=[0.4, -0.7, 1.1, -0.2])
    weights = term_weights(BETA)
    found = objective(batch, targets)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(found["loss"], parameters, allow_unused=True)
    # The formula in plain autograd: each term alone, times its precision.
    precisions_K, log_variances_K = objective.learned_weights()
    assert objective.learned_weights.groups == ("supervised", "reverse_kl", "attention", "vision")
    fixed = replace(BETA, weighting="fixed")
    reference = learned(tiny, deep, fixed)
    terms = {}
    for name, alone in one_term_recipes(fixed).items():
        terms[name] = reference(batch, targets, recipe=alone)["loss"]
    expected = log_variances_K.sum()
    for group, precision in zip(objective.learned_weights.groups, precisions_K, strict=True):
        expected = expected + precision * sum(terms[name] for name in terms if name.startswith(group))
    torch.testing.assert_close(found["loss"], expected, rtol=1e-5, atol=1e-5)
    own = dict(objective.named_parameters())
    other = dict(reference.named_parameters())
    # The adapters of the two begin alike; the student is the same.
    wanted = [other.get(name, p) for name, p in own.items() if p.requires_grad]
    for got, want in zip(gradients, torch.autograd.grad(expected, wanted, allow_unused=True), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    assert sum(weights.values()) > 0


def test_of_a_step_in_parts_the_penalty_is_counted_once(tiny, deep):
    samples = mixture(tiny)
    parts = [batch_of(tiny, samples[:2]), batch_of(tiny, samples[2:])]
    together = batch_of(tiny, samples)
    counts = [part.counts() for part in parts]
    names = ("answers", "with_text_after_image", "with_image", "samples")
    step = Counts(**{name: sum(getattr(c, name) for c in counts) for name in names})
    objective = learned(tiny, deep, raw=[0.4, -0.7, 1.1, -0.2])
    whole_loss = objective(together, targets_of(deep, together))["loss"]
    in_parts = [objective(part, targets_of(deep, part), step)["loss"] for part in parts]
    torch.testing.assert_close(sum(in_parts), whole_loss, rtol=1e-5, atol=1e-5)
    raw = objective.learned_weights.log_variances
    (gradient,) = torch.autograd.grad(whole_loss, raw)
    (of_parts,) = torch.autograd.grad(sum(in_parts), raw)
    torch.testing.assert_close(of_parts, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [0.02, 1.0, 40.0])
def test_no_precision_goes_to_zero_for_free_and_each_finds_the_inverse_of_its_term(size):
    weights = LearnedWeights(["supervised", "attention"])
    terms = {"supervised": torch.tensor(size), "attention": torch.tensor(1.0)}
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.3)
    for _ in range(400):
        optimizer.zero_grad()
        precisions_K, log_variances_K = weights()
        learned_part(weights.of_terms(precisions_K, terms), terms, log_variances_K.sum()).backward()
        optimizer.step()
    precisions = weights.of_terms(weights()[0], terms)
    assert precisions["supervised"].item() == pytest.approx(1 / size, rel=0.02)
    assert precisions["attention"].item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("raw", [-1e3, 1e3])
def test_a_precision_stays_positive_and_bounded_and_can_always_come_back(raw):
    weights = LearnedWeights(["supervised"])
    weights.log_variances.data.fill_(raw)
    (precision,) = weights()[0].tolist()
    assert math.exp(-5.01) < precision < math.exp(5.01)
    weights.log_variances.data.fill_(math.copysign(8.0, raw))
    weights()[0].sum().backward()
    assert weights.log_variances.grad.abs().item() > 1e-4


def test_gradient_norms_of_single_terms_carry_their_precision_and_not_the_penalty(tiny, deep):
    batch = batch_of(tiny, mixture(tiny))
    targets = targets_of(deep, batch)
    objective = learned(tiny, deep, raw=[0.0, 0.0, -1.0, 0.0])
    alone = one_term_recipes(BETA)["attention"]
    outcome = objective(batch, targets, recipe=alone)
    precision = math.exp(5 * math.tanh(1 / 5))
    torch.testing.assert_close(outcome["loss"], BETA.attention * precision * outcome["terms"]["attention"])
    assert torch.autograd.grad(outcome["loss"], objective.learned_weights.log_variances, allow_unused=True) == (None,)


def test_learned_weights_are_saved_with_the_objective(tiny, deep):
    names = set(learned(tiny, deep).state_dict())
    assert {name for name in names if "learned" in name} == {"learned_weights.log_variances"}
    assert not any("learned" in name for name in learned(tiny, deep, RECIPES["align-kd"]).state_dict())
