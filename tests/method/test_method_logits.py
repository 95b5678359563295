"""Logit targets: what every form promises, and what each adds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkd.targets.logit_levels import LOWEST_CODE
from alignkd.targets.logits import LOGIT_CODECS, Calibration, LogitSettings
from alignkd.targets.logits.kept import (
    choose,
    decode_ids,
    decode_logprobs,
    encode_ids,
    encode_logprobs,
    rank_order,
)
from alignkd.targets.logits.sketch import allocate, fit_sketch, pack_bits, unpack_bits
from tests.reference.divergences import DIVERGENCES
from tests.reference.logits import bucketed, divergence, logprob_error, outcomes

VOCABULARY, WIDTH, ANSWERS = 97, 24, 40
SETTINGS = {
    "topk": LogitSettings("topk", top_k=8),
    "sampled": LogitSettings("sampled", top_k=4, draws=6),
    "sketch": LogitSettings("sketch", top_k=4, sketch_bytes=12),
    "hidden": LogitSettings("hidden"),
    "hidden in 16 bits": LogitSettings("hidden", hidden_bits=16),
}


class Teacher:
    """A head, and hidden states that lie mostly in a few directions, as a language model's do."""

    def __init__(self, seed: int = 0, bias: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        spread_D = torch.linspace(2, -3, WIDTH).exp()
        self.head_ND = torch.randn(VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5
        self.bias_N = torch.randn(VOCABULARY, generator=generator) if bias else None
        turn_DD = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
        self.calibration_MD = (torch.randn(400, WIDTH, generator=generator) * spread_D) @ turn_DD + 0.3
        self.hidden_AD = (torch.randn(ANSWERS, WIDTH, generator=generator) * spread_D) @ turn_DD + 0.3
        self.labels_A = torch.randint(VOCABULARY, (ANSWERS,), generator=generator)
        self.uniform_AX = 1 - torch.rand(ANSWERS, 64, generator=generator)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden, self.head_ND, self.bias_N)

    @property
    def calibration(self) -> Calibration:
        mean_N = self.logits(self.calibration_MD).softmax(dim=1).mean(dim=0)
        return Calibration(self.calibration_MD, self.head_ND, self.bias_N, mean_N)

    def codec(self, chosen: LogitSettings):
        kind = LOGIT_CODECS[chosen.kind]
        return kind(chosen, kind.calibrate(chosen, self.calibration))

    def values(self, codec, uniform_AX=None):
        """As they come out of a cache: rounded to what is stored."""
        uniform_AX = self.uniform_AX if uniform_AX is None else uniform_AX
        logits_AN = self.logits(self.hidden_AD)
        found = codec.encode(self.hidden_AD, logits_AN, self.labels_A, uniform_AX[:, : codec.settings.draws])
        shapes = codec.fields(codec.settings, VOCABULARY)
        assert found.keys() == shapes.keys()
        return {name: stored(value, shapes[name].codec) for name, value in found.items()}


def stored(value: torch.Tensor, codec: str) -> torch.Tensor:
    if codec == "float16":
        return value.half().float()
    if codec == "int8-rows":
        scale = value.abs().amax(dim=1, keepdim=True) / 127
        return (value / scale).round() * scale
    return value


def student_logits(seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 2 * torch.randn(ANSWERS, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(name: str, student_AN: torch.Tensor, teacher_AN: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    q, p = (student_AN / temperature).log_softmax(1), (teacher_AN / temperature).log_softmax(1)
    if name == "reverse_kl":
        return (q.exp() * (q - p)).sum(1)
    if name == "forward_kl":
        return (p.exp() * (p - q)).sum(1)
    middle = ((p.exp() + q.exp()) / 2).log()
    return ((q.exp() * (q - middle)).sum(1) + (p.exp() * (p - middle)).sum(1)) / 2


every_codec = pytest.mark.parametrize("chosen", SETTINGS.values(), ids=SETTINGS)
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)


# What every form promises.


@every_codec
@every_divergence
def test_the_gradient_of_every_divergence_is_right(chosen, name):
    teacher = Teacher()
    codec = teacher.codec(chosen)
    values = {key: value[:3] for key, value in teacher.values(codec).items()}
    student = student_logits(dtype=torch.float64)[:3].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence(codec, name, x, values, 1.0), student, atol=1e-4)


@every_codec
@every_divergence
def test_no_divergence_is_negative(chosen, name):
    if (chosen.kind, name) == ("sampled", "forward_kl"):
        pytest.skip("unbiased for one draw, and so below zero now and then")
    codec = Teacher().codec(chosen)
    for seed in range(5):
        found = divergence(codec, name, student_logits(seed), Teacher().values(codec), 1.0)
        assert (found > -1e-5).all()


@every_codec
def test_outcomes_of_both_sides_sum_to_one(chosen):
    codec = Teacher().codec(chosen)
    for side in outcomes(codec, student_logits(), Teacher().values(codec), 1.0):
        torch.testing.assert_close(side.exp().sum(dim=1), torch.ones(ANSWERS), rtol=0, atol=1e-4)


@every_codec
@every_divergence
def test_half_precision_logits_are_compared_in_single_precision(chosen, name):
    codec = Teacher().codec(chosen)
    half = student_logits().bfloat16()
    found = divergence(codec, name, half, Teacher().values(codec), 1.0)
    torch.testing.assert_close(found, divergence(codec, name, half.float(), Teacher().values(codec), 1.0), rtol=0, atol=0)


@every_codec
def test_the_targets_are_close_to_the_teacher_where_the_teacher_is_likely(chosen):
    teacher = Teacher()
    codec = teacher.codec(chosen)
    _, found_AX = outcomes(codec, teacher.logits(teacher.hidden_AD), teacher.values(codec), 1.0)
    expected_AN = teacher.logits(teacher.hidden_AD).log_softmax(dim=1)
    likeliest_A = expected_AN.max(dim=1).values
    error_A = (found_AX - likeliest_A[:, None]).abs().min(dim=1).values
    assert (error_A <= logprob_error(likeliest_A) + 0.03).all()


@pytest.mark.parametrize("kind", ["topk", "sampled", "sketch"])
def test_with_the_whole_vocabulary_every_divergence_is_the_dense_one_but_for_rounding(kind):
    teacher = Teacher()
    codec = teacher.codec(replace(SETTINGS[kind], top_k=VOCABULARY))
    student, logits = student_logits(), teacher.logits(teacher.hidden_AD)
    for name in DIVERGENCES:
        found = divergence(codec, name, student, teacher.values(codec), 1.0)
        torch.testing.assert_close(found, dense(name, student, logits), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("bias", [False, True])
@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_hidden_states_in_16_bits_give_the_dense_divergence_at_any_temperature(name, temperature, bias):
    teacher = Teacher(bias=bias)
    codec = teacher.codec(SETTINGS["hidden in 16 bits"])
    student, logits = student_logits(), teacher.logits(teacher.hidden_AD)
    found = divergence(codec, name, student, teacher.values(codec), temperature)
    torch.testing.assert_close(found, dense(name, student, logits, temperature), rtol=2e-3, atol=2e-3)


@every_codec
def test_a_cache_is_described_by_what_matters_for_its_kind_alone(chosen):
    other = replace(chosen, **{"topk": {"draws": 3}, "sampled": {"sketch_bytes": 3}}.get(chosen.kind, {"draws": 3}))
    assert other.fingerprint() == chosen.fingerprint()
    same = replace(chosen, temperature=2.0).fingerprint() == chosen.fingerprint()
    assert same == (chosen.kind == "hidden")


@pytest.mark.parametrize(
    ("field", "value"), [("kind", "dense"), ("top_k", 0), ("draws", 0), ("sketch_bytes", 0), ("hidden_bits", 4)]
)
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{value!r}"):
        LogitSettings(**{field: value})


# Divergences.


@every_divergence
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 8))
def test_divergences_are_their_formulas(name, seed, scale):
    student, teacher = (scale * student_logits(seed + i, torch.float64)[:4] for i in range(2))
    found = DIVERGENCES[name](student.log_softmax(1), teacher.log_softmax(1))
    torch.testing.assert_close(found, dense(name, student, teacher), rtol=1e-9, atol=1e-9)


@every_divergence
def test_equal_distributions_have_no_divergence_and_no_gradient(name):
    student = student_logits(dtype=torch.float64).requires_grad_()
    found = DIVERGENCES[name](student.log_softmax(1), student.detach().log_softmax(1))
    found.sum().backward()
    assert found.abs().max() < 1e-12
    assert student.grad.abs().max() < 1e-12


@every_divergence
def test_an_outcome_impossible_for_both_counts_nothing_and_gives_no_nan(name):
    student = student_logits()[:, :5].requires_grad_()
    teacher = student_logits(2)[:, :5].log_softmax(1)
    impossible = torch.full((ANSWERS, 1), -torch.inf)
    found = DIVERGENCES[name](torch.cat([student.log_softmax(1), impossible], 1), torch.cat([teacher, impossible], 1))
    torch.testing.assert_close(found, dense(name, student, teacher))
    found.sum().backward()
    assert torch.isfinite(student.grad).all()


@every_divergence
def test_jensen_shannon_is_bounded_and_all_are_lower_bounds_with_a_bucket(name):
    student, teacher = 4 * student_logits(1, torch.float64), 4 * student_logits(2, torch.float64)
    logprobs = teacher.log_softmax(1)
    ids = choose(logprobs, 5, Teacher().labels_A)
    tail = logprobs.scatter(1, ids, -torch.inf).logsumexp(1)
    sides = bucketed(student.log_softmax(1), ids, logprobs.gather(1, ids), tail)
    found, whole = DIVERGENCES[name](*sides), dense(name, student, teacher)
    assert (found <= whole + 1e-9).all()
    assert (found >= -1e-9).all()
    if name == "jensen_shannon":
        assert (whole <= math.log(2)).all()


# Kept tokens.


def test_the_label_is_always_kept_and_the_likeliest_tokens_with_it():
    logprobs = student_logits().log_softmax(1)
    labels = Teacher().labels_A
    ids = choose(logprobs, 5, labels)
    assert (ids == labels[:, None]).any(1).all()
    best = logprobs.topk(5, dim=1).indices
    for mine, theirs, label in zip(ids.tolist(), best.tolist(), labels.tolist(), strict=True):
        assert len(set(mine)) == 5
        assert set(mine) == set(theirs) if label in theirs else set(mine) == {*theirs[:4], label}


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), vocabulary=st.integers(1, 300), k=st.integers(1, 20))
def test_ids_come_back_in_the_order_of_their_ranks(seed, vocabulary, k):
    generator = torch.Generator().manual_seed(seed)
    id_of_rank = rank_order(torch.rand(vocabulary, generator=generator))
    rank_of_id = torch.empty(vocabulary, dtype=torch.long).scatter(0, id_of_rank.long(), torch.arange(vocabulary))
    ids = torch.stack([torch.randperm(vocabulary, generator=generator)[: min(k, vocabulary)] for _ in range(3)])
    steps, order = encode_ids(ids, rank_of_id)
    assert (steps >= 0).all()
    assert torch.equal(decode_ids(steps, id_of_rank), ids.gather(1, order))


def test_frequent_tokens_have_low_ranks_and_ties_stay_in_the_order_of_ids():
    assert rank_order(torch.tensor([0.1, 0.4, 0.1, 0.4])).tolist() == [1, 3, 0, 2]


@settings(max_examples=200, deadline=None)
@given(value=st.floats(-200, 0))
def test_a_kept_log_probability_is_within_its_stated_error(value):
    logprob = torch.tensor([[value]], dtype=torch.float32)
    codes = encode_logprobs(logprob)
    assert (decode_logprobs(codes) - logprob).abs() <= logprob_error(logprob)
    assert codes.item() <= LOWEST_CODE


# Draws.


def test_draws_are_unbiased():
    """The mean of the drawn tail probabilities over many draws is the tail itself, token by token."""
    teacher = Teacher()
    codec = teacher.codec(LogitSettings("sampled", top_k=4, draws=64))
    logits = teacher.logits(teacher.hidden_AD)[:1].expand(4000, -1)
    uniform = 1 - torch.rand(4000, 64, generator=torch.Generator().manual_seed(5))
    found = codec.encode(teacher.hidden_AD[:1], logits, teacher.labels_A[:1].expand(4000), uniform)
    ids = decode_ids(found["draw_rank_steps"], codec.id_of_rank)
    kept = set(decode_ids(found["topk_rank_steps"], codec.id_of_rank)[0].tolist())
    rest = logits[0].softmax(0)
    rest[list(kept)] = 0
    expected = rest / rest.sum()
    counts = torch.bincount(ids.flatten(), minlength=VOCABULARY).double()
    assert counts[list(kept)].sum() == 0
    total = counts.sum()
    chi_squared = ((counts - total * expected) ** 2 / (total * expected).clamp(min=1e-12))[expected * total > 5].sum()
    cells = int((expected * total > 5).sum()) - 1
    assert abs(chi_squared - cells) < 5 * (2 * cells) ** 0.5


def test_the_mean_gradient_of_drawn_forward_kl_is_the_dense_one():
    """Over 4,000 draws the error is within five standard errors in every direction that was tried."""
    teacher = Teacher()
    codec = teacher.codec(LogitSettings("sampled", top_k=4, draws=8))
    repeats = 4000
    logits = teacher.logits(teacher.hidden_AD)[:1]
    student = student_logits()[:1]
    uniform = 1 - torch.rand(repeats, 8, generator=torch.Generator().manual_seed(6))
    values = codec.encode(teacher.hidden_AD[:1], logits.expand(repeats, -1), teacher.labels_A[:1].expand(repeats), uniform)
    many = student.expand(repeats, -1).clone().requires_grad_()
    divergence(codec, "forward_kl", many, values, 1.0).sum().backward()
    kept_ids, kept_logprobs, tail = codec.kept(values)
    rounded = logits.log_softmax(1)[0]
    rest = rounded.index_fill(0, kept_ids[0], -torch.inf)
    rest = rest - rest.logsumexp(0) + tail[0]
    exact = student.softmax(1)[0] - rest.index_copy(0, kept_ids[0], kept_logprobs[0]).exp()
    directions = torch.randn(VOCABULARY, 20, generator=torch.Generator().manual_seed(7))
    along = many.grad @ directions
    errors = (along.mean(0) - exact @ directions).abs()
    assert (errors < 5 * along.std(0) / repeats**0.5 + 1e-6).all()


def test_the_same_numbers_draw_the_same_tokens():
    teacher = Teacher()
    codec = teacher.codec(SETTINGS["sampled"])
    once, again = (teacher.values(codec) for _ in range(2))
    other = teacher.values(codec, 1 - teacher.uniform_AX.flip(1))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not torch.equal(once["draw_rank_steps"], other["draw_rank_steps"])


def test_a_teacher_that_is_sure_has_nothing_to_draw_and_gives_no_nan():
    teacher = Teacher()
    codec = teacher.codec(SETTINGS["sampled"])
    logits = torch.full((1, VOCABULARY), -1e4)
    logits[0, 3] = 0.0
    values = codec.encode(teacher.hidden_AD[:1], logits, torch.tensor([3]), teacher.uniform_AX[:1, :6])
    for name in DIVERGENCES:
        student = student_logits()[:1].requires_grad_()
        divergence(codec, name, student, values, 1.0).sum().backward()
        assert torch.isfinite(student.grad).all()


# Sketches.


@settings(max_examples=50, deadline=None)
@given(bits=st.lists(st.integers(2, 8), min_size=1, max_size=40), seed=st.integers(0, 2**31))
def test_packed_codes_come_back(bits, seed):
    bits_R = torch.tensor(bits, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.rand(5, len(bits), generator=generator) * 2.0 ** bits_R.float()).int()
    packed = pack_bits(codes, bits_R, -(-sum(bits) // 8))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, bits_R), codes)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=60), st.integers(8, 400))
def test_bits_go_to_the_largest_variances_and_never_pass_what_there_is(variances, total):
    variance = torch.tensor(sorted(variances, reverse=True), dtype=torch.float64)
    bits = allocate(variance, total)
    assert bits.sum() <= total
    assert set(bits.tolist()) <= {0, 2, 3, 4, 5, 6, 7, 8}
    assert (bits[1:] <= bits[:-1]).all()


def test_more_bytes_bring_the_tail_closer_to_the_teachers():
    teacher = Teacher()
    logits = teacher.logits(teacher.hidden_AD)
    errors = []
    for size in (2, 4, 8, 16):
        codec = teacher.codec(replace(SETTINGS["sketch"], sketch_bytes=size))
        _, found = outcomes(codec, logits, teacher.values(codec), 1.0)
        errors.append(DIVERGENCES["forward_kl"](found, logits.log_softmax(1)).mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4


def test_a_sketch_keeps_the_tails_mass_and_the_kept_tokens():
    teacher = Teacher()
    codec = teacher.codec(SETTINGS["sketch"])
    values = teacher.values(codec)
    ids, logprobs, tail = codec.kept(values)
    _, whole = outcomes(codec, student_logits(), values, 1.0)
    torch.testing.assert_close(whole.gather(1, ids), logprobs)
    torch.testing.assert_close(whole.scatter(1, ids, -torch.inf).logsumexp(1), tail, rtol=1e-4, atol=1e-4)


def test_a_sketch_of_a_biased_head_includes_the_bias():
    teacher = Teacher(bias=True)
    codec = teacher.codec(replace(SETTINGS["sketch"], sketch_bytes=24))
    logits = teacher.logits(teacher.hidden_AD)
    _, found = outcomes(codec, logits, teacher.values(codec), 1.0)
    assert DIVERGENCES["forward_kl"](found, logits.log_softmax(1)).mean() < 0.01


def test_a_calibration_of_one_answer_still_gives_a_sketch():
    teacher = Teacher()
    teacher.calibration_MD = teacher.calibration_MD[:1]
    codec = teacher.codec(SETTINGS["sketch"])
    for name in DIVERGENCES:
        assert torch.isfinite(divergence(codec, name, student_logits(), teacher.values(codec), 1.0)).all()


def _low_rank_head(name):
    """An output head ``[N, D]`` and the rank of its logits when they are centred."""
    generator = torch.Generator().manual_seed(7)
    width = 96
    full = torch.randn(40, width, generator=generator)
    narrow = torch.randn(300, 5, generator=generator) @ torch.randn(5, width, generator=generator)
    return {
        "fewer tokens than the width": (full, 39),
        "as many tokens as the width": (torch.randn(width, width, generator=generator), width),
        "one token more than the width, of which two are equal": (torch.cat([full[:1], full, full.flip(0), full[:16]]), 39),
        "rank five": (narrow, 5),
        "rank five, with rows that nothing uses": (torch.cat([narrow, torch.zeros(50, width)]), 5),
        "in half precision": (narrow.half(), width),
        "all tokens alike": (full[:1].repeat(200, 1), width),
    }[name]


LOW_RANK = (
    *("fewer tokens than the width", "as many tokens as the width", "one token more than the width, of which two are equal"),
    *("rank five", "rank five, with rows that nothing uses", "in half precision", "all tokens alike"),
)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", LOW_RANK)
def test_a_head_of_low_rank_is_sketched_in_its_own_span(name, bias):
    head_ND, rank = _low_rank_head(name)
    generator = torch.Generator().manual_seed(8)
    hidden_MD = torch.randn(400, head_ND.shape[1], generator=generator)
    bias_N = torch.randn(len(head_ND), generator=generator) if bias else None
    logits_MN = hidden_MD @ head_ND.float().T + (0 if bias_N is None else bias_N)
    mean_N = logits_MN.softmax(1).mean(0)
    sketch = fit_sketch(hidden_MD, head_ND, bias_N, mean_N, 96)
    assert all(torch.isfinite(getattr(sketch, part)).all() for part in ("projection_RD", "step_R", "base_N", "head_NR"))
    assert len(sketch.bits_R) <= rank
    assert int(sketch.bits_R.sum()) <= 8 * 96
    weight_N = 0.5 * mean_N + 0.5 / len(mean_N)
    truth_MN = logits_MN - (logits_MN @ weight_N)[:, None]
    found_MN = sketch.decoder()(sketch.encode(hidden_MD))
    assert (found_MN - truth_MN).square().mean() <= 2e-3 * truth_MN.square().mean() + 1e-4
