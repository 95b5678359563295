"""Warnings from log lines, each once an episode; and a stop that names the samples whose loss is no number."""

from __future__ import annotations

import math

import pytest
import torch

from alignkd.losses.recipes import RECIPES, Recipe
from alignkd.pipeline.training.monitoring import health_checks
from alignkd.pipeline.training.monitoring.health_checks import FiniteCheck, HealthChecks, NotFiniteError

BALANCED = {"share/supervised": 0.4, "share/reverse_kl": 0.3, "share/attention": 0.1, "share/vision_all": 0.15}
BALANCED |= {"share/vision_focus": 0.05}


def warnings(checks, lines, **values):
    """What so many equal lines bring: the number of the line, and the warning."""
    line = {**BALANCED, **{name.replace("__", "/"): value for name, value in values.items()}}
    return [(number, text) for number in range(1, lines + 1) for text in checks({**line, "step": number})]


def test_a_balanced_run_brings_no_warning():
    assert warnings(HealthChecks(RECIPES["align-kd"]), 50, attention_contrast=2.0) == []


@pytest.mark.parametrize(
    ("term", "shares", "value"),
    [("attention", {"attention": 0.0099}, "5"), ("vision", {"vision_all": 0.009, "vision_focus": 0.0009}, "1")],
)
def test_a_term_that_stays_negligible_is_named_with_its_field_and_weight_at_the_tenth_line(term, shares, value):
    [(number, text)] = warnings(
        HealthChecks(RECIPES["align-kd"]), 30, **{f"share__{name}": share for name, share in shares.items()}
    )
    assert number == 10
    assert text.startswith(f"{term} was below 1% of the loss in 10 log lines (now 0.99%, step 10)")
    assert f"--set {term}=..., now {value})" in text


def test_the_focus_may_be_as_small_a_part_of_the_vision_term_as_its_weight_makes_it():
    assert warnings(HealthChecks(RECIPES["align-kd"]), 30, share__vision_focus=0.005) == []


def test_a_term_that_stays_dominant_is_named_at_the_tenth_line():
    [(number, text)] = warnings(HealthChecks(RECIPES["align-kd"]), 30, share__supervised=0.901)
    assert number == 10
    assert text.startswith("supervised was above 90% of the loss in 10 log lines (now 90.10%, step 10)")
    assert "--set supervised=..., now 1)" in text


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_a_share_at_a_bound_or_between_them_is_no_reason_to_warn(share):
    assert warnings(HealthChecks(RECIPES["align-kd"]), 30, share__attention=share) == []


def test_nine_lines_and_a_better_one_bring_no_warning():
    checks = HealthChecks(RECIPES["align-kd"])
    for _ in range(5):
        assert warnings(checks, 9, share__attention=0.001) == []
        assert warnings(checks, 1) == []


def test_a_warning_comes_again_in_a_new_episode_only():
    checks = HealthChecks(RECIPES["align-kd"])
    assert len(warnings(checks, 100, share__attention=0.001)) == 1
    assert warnings(checks, 1) == []
    assert len(warnings(checks, 10, share__attention=0.001)) == 1


def test_the_number_of_lines_is_a_setting():
    assert [number for number, _ in warnings(HealthChecks(RECIPES["align-kd"], lines=3), 9, share__attention=0.001)] == [3]


def test_a_recipe_of_one_term_is_never_dominated_by_it():
    assert warnings(HealthChecks(RECIPES["sft"]), 30, share__supervised=1.0) == []
    assert warnings(HealthChecks(Recipe(supervised=0.0, attention=1.0)), 30, share__attention=1.0) == []


def test_a_term_without_weight_is_not_negligible():
    assert warnings(HealthChecks(Recipe(supervised=0.0, reverse_kl=1.0, attention=1.0)), 30, share__supervised=0.0) == []


@pytest.mark.parametrize("line", [{}, {"share/attention": math.nan}])
def test_lines_without_a_share_are_no_reason_to_warn(line):
    checks = HealthChecks(RECIPES["align-kd"])
    assert [checks({"step": step, **line}) for step in range(30)] == [[]] * 30


def test_a_teacher_of_uniform_attention_is_named_with_the_terms_that_follow_it():
    [(number, text)] = warnings(HealthChecks(RECIPES["align-kd"]), 30, attention_contrast=9e-4)
    assert number == 10
    assert text.startswith("the teacher's attention over vision tokens was uniform in 10 log lines (relative variance 9.0e-04")
    assert "--set attention=0 --set vision_focus=0" in text
    [(_, text)] = warnings(HealthChecks(Recipe(attention=1.0)), 30, attention_contrast=0.0)
    assert "vision_focus" not in text


def test_attention_that_differs_by_a_little_is_no_reason_to_warn():
    assert warnings(HealthChecks(RECIPES["align-kd"]), 30, attention_contrast=1.1e-3) == []


def test_truncation_is_reported_once_with_its_counts_and_the_option():
    checks = HealthChecks(RECIPES["sft"], max_length=512)
    assert warnings(checks, 5, samples=8, truncated=0) == []
    [(number, text)] = warnings(checks, 5, samples=3000, truncated=1200)
    assert number == 1
    assert text.startswith("1,200 of the first 3,000 samples were longer than --max-length 512 and were cut there")
    assert "'truncated'" in text
    assert warnings(checks, 5, samples=4000, truncated=1300) == []


# --- samples whose loss is not finite ------------------------------------------------------------------------------------


def ids(count, first=0):
    return [f"sample {first + i}" for i in range(count)]


def test_the_samples_whose_loss_is_not_finite_are_named_with_the_step_and_the_way_out():
    finite = FiniteCheck()
    finite.add(torch.tensor([False, True, False, True]), ids(4), step=41)
    with pytest.raises(NotFiniteError) as error:
        finite.check()
    assert isinstance(error.value, ValueError)
    assert (error.value.step, error.value.sample_ids) == (41, ("sample 1", "sample 3"))
    text = str(error.value)
    assert text.startswith("step 41: a loss term is not a finite number for 2 of 4 samples: sample 1, sample 3. ")
    for way_out in ("alignkd show", "alignkd cache inspect", "--learning-rate", "--dtype bfloat16", "--resume"):
        assert way_out in text


def test_a_batch_of_nothing_else_points_at_the_weights_and_names_ten():
    finite = FiniteCheck()
    finite.add(torch.ones(30, dtype=torch.bool), ids(30), step=2)
    with pytest.raises(NotFiniteError, match=r"sample 9 and 20 more\..*the weights themselves") as error:
        finite.check()
    assert "sample 10" not in str(error.value)
    assert len(error.value.sample_ids) == 30


def test_a_finite_run_is_never_stopped():
    finite = FiniteCheck()
    for step in range(5):
        finite.add(torch.zeros(2, dtype=torch.bool), ids(2), step=step)
        finite.check()
    finite.check(wait=True)


def test_flags_are_those_of_the_moment_they_were_given():
    finite, flags = FiniteCheck(), torch.tensor([True])
    finite.add(flags, ids(1), step=1)
    flags.zero_()
    with pytest.raises(NotFiniteError):
        finite.check()


class _Arrival:
    """An event of a device that is busy until it is waited for."""

    def __init__(self):
        self.done = False

    def query(self):
        return self.done

    def synchronize(self):
        self.done = True


@pytest.fixture
def busy(monkeypatch):
    """Copies from a device that is busy; their events, in order."""
    arrivals: list[_Arrival] = []

    def to_host(tensors):
        arrivals.append(_Arrival())
        return {name: tensor.clone() for name, tensor in tensors.items()}, arrivals[-1]

    monkeypatch.setattr(health_checks, "copy_to_host", to_host)
    return arrivals


def test_a_busy_device_is_not_waited_for_until_a_checkpoint_asks(busy):
    finite = FiniteCheck()
    finite.add(torch.tensor([False]), ids(1), step=1)
    finite.add(torch.tensor([True]), ids(1, first=7), step=2)
    finite.check()
    assert [arrival.done for arrival in busy] == [False, False]
    with pytest.raises(NotFiniteError, match=r"step 2: .*sample 7"):
        finite.check(wait=True)


def test_flags_that_have_arrived_are_looked_at_in_order(busy):
    finite = FiniteCheck()
    for step in range(1, 4):
        finite.add(torch.tensor([step == 2]), ids(1, first=step), step=step)
    busy[0].done = True
    finite.check()
    busy[1].done = True
    with pytest.raises(NotFiniteError, match=r"step 2: .*sample 2"):
        finite.check()


@pytest.mark.gpu
def test_flags_of_a_gpu_arrive_without_a_synchronisation():
    finite = FiniteCheck()
    torch.cuda.set_sync_debug_mode("error")
    try:
        finite.add(torch.tensor([False, True], device="cuda"), ids(2), step=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(NotFiniteError, match=r"step 3: .*sample 1"):
        finite.check(wait=True)
