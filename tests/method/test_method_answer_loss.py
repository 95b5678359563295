"""The fused answer loss: the reference's losses and gradients, in little memory, in every precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from answer_cases import SETTINGS, assert_near, make_case
from exact_logits import ExactTopK
from torch.nn import functional
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from alignkd.losses.answer_loss import answer_terms, fused
from alignkd.targets.logits import LogitSettings
from tests.reference.divergences import DIVERGENCES
from tests.reference.logits import divergence

ALL = {"supervised": 0.7, "reverse_kl": 1.0, "forward_kl": 0.5, "jensen_shannon": 2.0}
every_codec = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def assert_as_reference(case, weights, temperature, tolerance):
    leaves = case.leaves()
    found = case.fused(leaves, weights, temperature)
    found.loss.backward()
    loss, gradients = case.expected(weights, temperature)
    assert_near(found.loss, loss, tolerance)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert_near(leaf.grad, gradient, tolerance)
    for name, term_A in case.terms(leaves, weights, temperature).items():
        assert_near(found.sums[name], term_A.sum(), tolerance)
    assert found.finite_A.all()


# Losses and gradients.


@every_codec
@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("far", [0.0, 0.1, 1.0, 30.0])
def test_loss_and_gradients_are_those_of_the_reference(settings, name, temperature, far):
    weights = {"supervised": 0.5, name: 1.0}
    assert_as_reference(make_case(settings, far=far), weights, temperature, 1e-5)
    # What is left is the teacher's side, which is float32 in both.
    tolerance = {"topk": 1e-7, "sampled": 1e-6}.get(settings.kind, 5e-6)
    assert_as_reference(make_case(settings, far=far, dtype=torch.float64), weights, temperature, tolerance)


@every_codec
@pytest.mark.parametrize("weights", [{"supervised": 1.0}, {"reverse_kl": 1.0}, ALL], ids=["supervised", "reverse", "all"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_terms_add_up_with_their_weights_with_or_without_a_bias(settings, weights, temperature):
    for bias in (False, True):
        assert_as_reference(make_case(settings, bias=bias), weights, temperature, 1e-5)


@pytest.mark.parametrize("kind", ["topk", "sampled", "sketch"])
@pytest.mark.parametrize("vocabulary", [7, 97])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_token_may_be_a_known_one(kind, vocabulary, temperature):
    case = make_case(replace(SETTINGS[kind], top_k=vocabulary), vocabulary, width=4)
    assert_as_reference(case, ALL, temperature, 1e-5)


@every_codec
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_a_vocabulary_of_seven_with_tokens_drawn_again_and_again(settings, top_k):
    for draws in (1, 4, 12):
        case = make_case(replace(settings, top_k=top_k, draws=draws, sketch_bytes=2), 7, width=4)
        assert_as_reference(case, ALL, 2.0, 1e-5)


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_a_tail_that_the_student_all_but_rules_out_still_gets_its_gradient(kind):
    """The tail's probability underflows: e^-200."""
    case = make_case(SETTINGS[kind], answers=1)
    kept = case.codec.kept(case.values)[0][0]
    logits = torch.full((1, 97), -200.0).index_fill(1, kept, 0.0) + case.hidden_AD @ case.head_ND.T
    sharp = replace(case, hidden_AD=logits, head_ND=torch.eye(97))
    assert_as_reference(sharp, {"forward_kl": 1.0, "supervised": 1.0}, 1.0, 1e-5)


@every_codec
def test_the_gradient_says_what_a_small_step_does(settings):
    """Without the reference: central differences along random directions."""
    case = make_case(settings, dtype=torch.float64, bias=True)
    leaves = case.leaves()
    case.fused(leaves, ALL, 2.0).loss.backward()
    generator, size = torch.Generator().manual_seed(1), 1e-5
    for _ in range(4):
        steps = [size * torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
        ahead, behind = (
            case.fused([leaf + sign * step for leaf, step in zip(leaves, steps, strict=True)], ALL, 2.0).loss.item()
            for sign in (1, -1)
        )
        predicted = sum((leaf.grad * step).sum().item() for leaf, step in zip(leaves, steps, strict=True))
        assert (ahead - behind) / 2 == pytest.approx(predicted, rel=1e-4)


@every_divergence
def test_a_token_impossible_for_both_counts_nothing(name):
    """A bias of -inf on both sides does what one of -10,000 does."""
    found = []
    for bias in (-torch.inf, -1e4):
        case = make_case(SETTINGS["hidden"], bias=True)
        ruled_out = torch.tensor([5, 60])
        case.codec.output_bias[ruled_out] = bias
        case.bias_N[ruled_out] = bias
        case.labels_A.fill_(3)
        leaves = case.leaves()
        terms = case.fused(leaves, {"supervised": 1.0, name: 1.0}, 2.0)
        terms.loss.backward()
        found.append([terms.loss.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        assert_near(one, other, 1e-6)
    assert_as_reference(case, {"supervised": 1.0, name: 1.0}, 2.0, 1e-5)


def test_a_token_impossible_for_the_teacher_alone_is_no_finite_reverse_kl():
    case = make_case(SETTINGS["hidden"], bias=True)
    case.codec.output_bias[5] = -torch.inf
    found = case.fused(case.leaves(), {"reverse_kl": 1.0})
    assert not found.finite_A.any()
    assert divergence(case.codec, "reverse_kl", case.hidden_AD @ case.head_ND.T, case.values, 1.0).isinf().all()


# What is asked for, and no more.


def test_chunks_change_nothing(monkeypatch):
    case = make_case(SETTINGS["sketch"])
    whole, parts = case.leaves(), case.leaves()
    expected = case.fused(whole, ALL)
    expected.loss.backward()
    monkeypatch.setattr(fused, "_SCRATCH_BYTES", 5 * 97 * 8)
    found = case.fused(parts, ALL)
    found.loss.backward()
    assert_near(found.loss, expected.loss, 1e-6)
    for part, one in zip(parts, whole, strict=True):
        assert_near(part.grad, one.grad, 1e-6)
    assert found.finite_A.shape == (24,)


def scratch(run):
    """Bytes of tensors at the peak of ``run``, over those that are left after it."""
    with profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        kept = run()
    events = sorted((e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    sizes = torch.tensor([e.nbytes() for e in events]).cumsum(0)
    del kept
    return int(sizes.max() - sizes[-1])


@every_codec
def test_scratch_does_not_grow_with_the_answers(settings, monkeypatch):
    monkeypatch.setattr(fused, "_SCRATCH_BYTES", 2**20)
    monkeypatch.setattr("alignkd.losses.answer_loss.rows._ELEMENTS", 2**14)
    dense = 4 * 2000 * 4000
    for answers in (1000, 4000):
        case = make_case(settings, 2000, answers)
        leaves = case.leaves()

        def run(case=case, leaves=leaves):
            case.fused(leaves, {"supervised": 1.0, "reverse_kl": 1.0}).loss.backward()
            return leaves

        assert scratch(run) < 4 * 2**20 < dense / 7


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("asked", "products"), [((), 1), ((0,), 2), ((1,), 2), ((0, 1), 3)])
def test_gradients_are_computed_for_those_alone_that_ask(asked, products):
    case = make_case(SETTINGS["topk"])
    leaves = [leaf.requires_grad_(i in asked) for i, leaf in enumerate(case.leaves())]
    with Products() as seen:
        loss = case.fused(leaves, {"supervised": 1.0, "reverse_kl": 1.0}).loss
        assert loss.requires_grad == bool(asked)
        if asked:
            loss.backward()
    assert seen.count == products
    _, gradients = case.expected({"supervised": 1.0, "reverse_kl": 1.0})
    for i, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        assert (leaf.grad is not None) == (i in asked)
        if i in asked:
            assert_near(leaf.grad, gradient, 1e-5)


def test_without_gradients_only_sums_are_computed():
    case = make_case(SETTINGS["sketch"])
    leaves = case.leaves()
    expected = case.fused(leaves, ALL)
    with torch.no_grad(), Products() as seen:
        found = case.fused(leaves, ALL)
    assert not found.loss.requires_grad
    assert seen.count == 2  # the student's logits and the sketch's
    assert_near(found.loss, expected.loss.detach(), 1e-6)
    assert {k: float(v) for k, v in found.sums.items()} == pytest.approx(
        {k: float(v) for k, v in expected.sums.items()}, rel=1e-5
    )


def test_no_answers_give_a_loss_of_zero_with_a_gradient_of_zero():
    case = make_case(SETTINGS["topk"])
    values = {name: value[:0] for name, value in case.values.items()}
    none = replace(case, values=values, hidden_AD=case.hidden_AD[:0], labels_A=case.labels_A[:0])
    leaves = none.leaves()
    found = none.fused(leaves, ALL)
    found.loss.backward()
    assert found.loss == 0
    assert found.sums == dict.fromkeys(ALL, 0.0)
    assert found.finite_A.shape == (0,)
    assert leaves[0].grad.shape == (0, 12)
    assert torch.equal(leaves[1].grad, torch.zeros(97, 12))


@every_codec
def test_a_term_of_weight_zero_is_reported_and_touches_nothing_even_when_it_overflows(settings):
    case = make_case(settings)
    bad = {name: value.clone() for name, value in case.values.items()}
    if settings.kind == "hidden":
        bad["hidden"][3] = torch.nan
    else:
        bad["tail_logmass"][3] = torch.nan
    case = replace(case, values=bad)
    alone, with_bad = case.leaves(), case.leaves()
    expected = case.fused(alone, {"supervised": 1.0})
    expected.loss.backward()
    found = case.fused(with_bad, {"supervised": 1.0, "reverse_kl": 0.0, "forward_kl": 0.0, "jensen_shannon": 0.0})
    found.loss.backward()
    assert found.finite_A.tolist() == [i != 3 for i in range(24)]
    assert found.sums["reverse_kl"].isnan()
    assert_near(found.loss, expected.loss, 1e-6)
    for one, other in zip(alone, with_bad, strict=True):
        assert_near(other.grad, one.grad, 1e-6)


def test_the_answer_that_is_not_finite_is_named():
    case = make_case(SETTINGS["topk"])
    hidden_AD = case.hidden_AD.clone()
    hidden_AD[7] = torch.inf
    found = replace(case, hidden_AD=hidden_AD).fused([hidden_AD, case.head_ND], ALL)
    assert found.finite_A.tolist() == [i != 7 for i in range(24)]


def test_a_second_backward_pass_is_refused():
    case = make_case(SETTINGS["topk"])
    loss = case.fused(case.leaves(), ALL).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call it again"):
        loss.backward()


def test_the_divisor_may_be_a_tensor_and_the_loss_may_be_scaled():
    case = make_case(SETTINGS["topk"])
    leaves = case.leaves()
    (5 * case.fused(leaves, ALL, divisor=torch.tensor(7)).loss).backward()
    _, gradients = case.expected(ALL)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert_near(leaf.grad, 5 * gradient, 1e-5)


def test_other_codecs_that_know_tokens_and_a_bucket_work_too():
    case = make_case(SETTINGS["topk"])
    codec = ExactTopK()
    values = codec.encode(case.hidden_AD, case.hidden_AD @ case.head_ND.T, case.labels_A, torch.ones(24, 1))
    assert_as_reference(replace(case, codec=codec, values=values, hidden_AD=3 * case.hidden_AD), ALL, 2.0, 1e-5)


# Precision.


@every_codec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_products_are_in_half_precision_and_losses_in_single(settings, dtype):
    case = make_case(settings, answers=200)
    leaves, reference = case.leaves(), case.leaves()
    with torch.autocast("cpu", dtype):
        found = case.fused(leaves, ALL)
        terms = case.terms(reference, ALL)
        expected = sum(ALL[name] * term.sum() for name, term in terms.items()) / 7
    found.loss.backward()
    expected.backward()
    assert found.loss.dtype == torch.float32
    # The same rounded logits on both sides, so that losses agree beyond half precision.
    assert_near(found.loss, expected, 2e-3 if settings.kind == "hidden" else 1e-5)
    step = torch.finfo(dtype).eps
    for leaf, other in zip(leaves, reference, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad - other.grad).norm() < 4 * step * other.grad.norm()


def test_float16_gradients_survive_a_mean_over_very_many_answers():
    case = make_case(SETTINGS["topk"], dtype=torch.float16)
    weights, divisor, scale = {"supervised": 1e-3, "reverse_kl": 1e-3}, 1e5, 2.0**24
    leaves = [leaf.detach().requires_grad_() for leaf in (case.hidden_AD, case.head_ND.float())]
    with torch.autocast("cpu", torch.float16):
        (case.fused(leaves, weights, divisor=divisor).loss * scale).backward()
    single = replace(case, hidden_AD=case.hidden_AD.float(), head_ND=case.head_ND.float())
    _, gradients = single.expected(weights, divisor=divisor / scale)
    assert leaves[0].grad.dtype == torch.float16
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert (leaf.grad.float() - gradient).norm() < 1e-2 * gradient.norm()


def test_a_single_precision_head_gathers_its_gradient_in_single_precision(monkeypatch):
    """In bfloat16 a sum over 400 chunks would stop growing."""
    case = make_case(SETTINGS["topk"], 7, answers=400, width=4)
    same = replace(case, hidden_AD=case.hidden_AD[:1].expand(400, -1).contiguous(), labels_A=case.labels_A[:1].expand(400))
    monkeypatch.setattr(fused, "_SCRATCH_BYTES", 1)
    leaves, one = same.leaves(), case.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        same.fused(leaves, {"supervised": 1.0}).loss.backward()
        first = replace(case, labels_A=case.labels_A[:1]).fused([one[0][:1], one[1]], {"supervised": 1.0})
    first.loss.backward()
    assert_near(leaves[1].grad, 400 * one[1].grad, 1e-5)


def test_pure_half_precision_parameters_get_gradients_of_their_own_type():
    case = make_case(SETTINGS["sketch"], dtype=torch.bfloat16)
    leaves = case.leaves()
    case.fused(leaves, ALL).loss.backward()
    single = replace(case, hidden_AD=case.hidden_AD.float(), head_ND=case.head_ND.float())
    _, gradients = single.expected(ALL)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad.dtype == torch.bfloat16
        assert (leaf.grad.float() - gradient).norm() < 3e-2 * gradient.norm()


# Beside the rest of torch.


@pytest.mark.slow
def test_a_compiled_model_may_call_it():
    """Traced, differentiated ahead of time, and run eagerly: generating code takes a minute and has no part in it."""
    case = make_case(SETTINGS["topk"])
    layer = torch.nn.Linear(12, 12)

    def objective(hidden_AD):
        found = answer_terms(
            functional.gelu(layer(hidden_AD)),
            case.head_ND,
            case.labels_A,
            weights=ALL,
            codec=case.codec,
            values=case.values,
            temperature=2.0,
            divisor=24,
        )
        return found.loss * 2, found.sums["reverse_kl"]

    gradients = []
    for run in (objective, torch.compile(objective, backend="aot_eager")):
        layer.zero_grad()
        loss, reverse_kl = run(case.hidden_AD)
        loss.backward()
        gradients.append((loss.detach(), reverse_kl, layer.weight.grad.clone()))
    for eager, compiled in zip(*gradients, strict=True):
        assert_near(compiled, eager, 1e-5)


def test_unknown_terms_and_divergences_without_a_codec_are_our_own_mistakes():
    case = make_case(LogitSettings("topk"))
    with pytest.raises(AssertionError, match="kl_divergence"):
        case.fused(case.leaves(), {"kl_divergence": 1.0})
    with pytest.raises(AssertionError, match="codec"):
        replace(case, codec=None).fused(case.leaves(), {"reverse_kl": 1.0})
