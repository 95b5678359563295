"""What a log line says: totals, means over steps, speed and waiting, in one process and in several, across a resume."""

from __future__ import annotations

import json
import math
import types

import pytest
import torch

from alignkd.errors import CheckpointError
from alignkd.pipeline.training.monitoring import metrics as metrics_module
from alignkd.pipeline.training.monitoring.metrics import Metrics

WEIGHTS = {"supervised": 1.0, "reverse_kl": 2.0, "attention": 0.5}
LOGS = {"loss": 99.0, "grad_norm": 0.75, "learning_rate": 1e-3}


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes when it is told to."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(metrics_module, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def outputs(supervised=1.0, reverse_kl=0.5, **others):
    terms = {"supervised": supervised, "reverse_kl": reverse_kl, **others}
    loss = sum(WEIGHTS.get(name, 0.0) * value for name, value in terms.items())
    return {name: torch.tensor(value) for name, value in {"loss": loss, **terms}.items()}


def add(metrics, *, samples=2, tokens=100, answers=10, truncated=0, **terms):
    metrics.add(outputs(**terms), samples=samples, tokens=tokens, answers=answers, truncated=truncated)


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def in_step(*calls):
    """Lines of processes that sum their vectors: each runs up to its sum, then all go on with the total."""
    vectors: list[torch.Tensor] = []

    class Waiting(Exception):  # noqa: N818
        pass

    def collect(vector):
        vectors.append(vector)
        raise Waiting

    for call in calls:
        with pytest.raises(Waiting):
            call(collect)
    total = torch.stack([vector.cpu() for vector in vectors]).sum(0)
    return [call(lambda _: total) for call in calls]


def test_micro_batches_add_up_to_a_step_and_a_line_is_the_mean_over_its_steps(path):
    metrics = Metrics(path, WEIGHTS, writes=True)
    for supervised in (1.0, 2.0, 3.0, 6.0):  # two micro-batches a step
        add(metrics, supervised=supervised, reverse_kl=0.5)
    line = metrics.line(dict(LOGS), step=2, epoch=0.1234567)
    assert line["supervised"] == 6.0
    assert line["reverse_kl"] == line["weighted/reverse_kl"] / 2 == 1.0
    assert line["loss"] == line["weighted/supervised"] + line["weighted/reverse_kl"] == 8.0
    assert (line["share/supervised"], line["share/reverse_kl"]) == (0.75, 0.25)
    assert (line["step"], line["epoch"], line["samples"], line["tokens"], line["answers"]) == (2, 0.12346, 8, 400, 40)
    assert (line["grad_norm"], line["learning_rate"]) == (0.75, 1e-3)
    assert line["peak_memory_bytes"] > 0
    assert not any(name.endswith("attention") for name in line)
    assert written(path) == [line]


def test_a_line_forgets_the_terms_of_the_line_before_and_keeps_the_totals(path):
    metrics = Metrics(path, WEIGHTS, writes=True)
    add(metrics, supervised=7.0)
    metrics.line(dict(LOGS), step=1, epoch=0.1)
    for _ in range(3):
        add(metrics, supervised=2.0)
    line = metrics.line(dict(LOGS), step=4, epoch=0.4)
    assert line["supervised"] == pytest.approx(2.0)
    assert line["samples"] == 8
    assert [one["samples"] for one in written(path)] == [2, 8]


def test_speed_and_waiting_are_those_since_the_last_line(path, clock):
    metrics = Metrics(path, WEIGHTS, writes=True)
    add(metrics)
    clock.now += 10
    assert metrics.line(dict(LOGS), step=1, epoch=0)["tokens_per_second"] == 10
    add(metrics, samples=8, tokens=600)
    metrics.waited(0.5)
    metrics.waited(0.25)
    clock.now += 3
    line = metrics.line(dict(LOGS), step=2, epoch=0)
    assert (line["tokens_per_second"], line["samples_per_second"]) == (200, pytest.approx(8 / 3, abs=1e-3))
    assert line["data_wait_share"] == 0.25
    assert line["seconds"] == 13
    clock.now += 1
    assert metrics.line(dict(LOGS), step=3, epoch=0)["data_wait_share"] == 0


def test_nothing_is_copied_to_the_host_until_a_line(path):
    metrics = Metrics(path, WEIGHTS, writes=True)
    # Tensors of the meta device have no values: whatever looks at one raises.
    on_device = {name: value.to("meta") for name, value in outputs(attention=1.0, attention_contrast=1.0).items()}
    for _ in range(3):
        metrics.add(on_device, samples=1, tokens=1, answers=1)
    with pytest.raises((RuntimeError, NotImplementedError)):
        metrics.line(dict(LOGS), step=1, epoch=0)


def test_a_line_of_two_processes_holds_totals_of_both_and_one_of_them_writes(tmp_path, clock):
    first, second = (Metrics(tmp_path / f"{i}.jsonl", WEIGHTS, writes=i == 0) for i in range(2))
    add(first, supervised=1.0, samples=2, tokens=100)
    add(second, supervised=2.0, samples=3, tokens=50, attention=4.0, truncated=2)
    first.waited(1.0)
    clock.now += 2
    lines = in_step(*(lambda r, m=m: m.line(dict(LOGS), step=1, epoch=0.5, reduce=r) for m in (first, second)))
    line, other = lines
    assert {**line, "peak_memory_bytes": 0} == {**other, "peak_memory_bytes": 0}
    assert (line["supervised"], line["attention"]) == (3.0, 4.0)
    assert line["loss"] == pytest.approx(sum(value for name, value in line.items() if name.startswith("weighted/")))
    assert (line["samples"], line["truncated"], line["tokens"], line["tokens_per_second"]) == (5, 2, 150, 75)
    assert line["data_wait_share"] == 0.25
    assert written(tmp_path / "0.jsonl") == [line]
    assert not (tmp_path / "1.jsonl").exists()


def test_a_process_without_a_batch_takes_part_in_the_sum(tmp_path):
    first, idle = (Metrics(tmp_path / f"{i}.jsonl", WEIGHTS, writes=i == 0) for i in range(2))
    add(first, supervised=3.0)
    lines = in_step(*(lambda r, m=m: m.line(dict(LOGS), step=1, epoch=0, reduce=r) for m in (first, idle)))
    assert [line["supervised"] for line in lines] == [3.0, 3.0]


def test_a_line_without_a_batch_has_the_loss_of_the_trainer_and_no_term(path):
    line = Metrics(path, WEIGHTS, writes=True).line(dict(LOGS), step=1, epoch=0)
    assert line["loss"] == 99.0
    assert not set(line) & set(WEIGHTS)


def test_a_term_without_weight_has_no_share_even_when_it_overflows(path):
    metrics = Metrics(path, {"supervised": 1.0, "attention": 0.0}, writes=True)
    metrics.add({"supervised": torch.tensor(2.0), "attention": torch.tensor(math.inf)}, samples=1, tokens=1, answers=1)
    line = metrics.line({}, step=1, epoch=0)
    assert (line["share/supervised"], line["share/attention"], line["weighted/attention"]) == (1.0, 0.0, 0.0)


def test_what_is_observed_is_averaged_over_the_batches_that_had_it(path):
    metrics = Metrics(path, WEIGHTS, writes=True)
    for contrast in (1.0, math.nan, 2.0):
        add(metrics, attention_contrast=contrast)
    assert metrics.line({}, step=1, epoch=0)["attention_contrast"] == 1.5
    add(metrics, attention_contrast=math.nan)
    assert "attention_contrast" not in metrics.line({}, step=2, epoch=0)


def test_the_file_is_strict_json_also_where_a_value_is_no_number(path):
    metrics = Metrics(path, WEIGHTS, writes=True)
    add(metrics, supervised=math.nan)
    line = metrics.line({"grad_norm": math.inf}, step=1, epoch=0)
    assert math.isnan(line["supervised"])
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()
    assert written(path)[0]["grad_norm"] is written(path)[0]["supervised"] is None


def steps(metrics, clock, numbers, *, every):
    """Steps of two micro-batches that differ, with a line after every so many."""
    for step in numbers:
        for half in (1, 2):
            add(metrics, supervised=1 / (3 * step + half), tokens=step + half, truncated=step % 2)
        clock.now += 1
        if step % every == 0:
            metrics.line(dict(LOGS), step=step, epoch=step / 10)


def without_waiting(lines):
    return [{k: v for k, v in line.items() if k not in ("peak_memory_bytes", "data_wait_share")} for line in lines]


@pytest.mark.parametrize("stop", range(13))
def test_a_run_stopped_after_any_step_writes_the_lines_of_a_run_that_was_not(tmp_path, clock, stop):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    steps(Metrics(whole, WEIGHTS, writes=True), clock, range(1, 13), every=4)
    before = Metrics(stopped, WEIGHTS, writes=True)
    steps(before, clock, range(1, stop + 1), every=4)
    state = json.loads(json.dumps(before.state_dict())) if stop else {}
    steps(before, clock, range(stop + 1, 13), every=4)  # these are lost, and run again
    clock.now += 1000
    after = Metrics(stopped, WEIGHTS, writes=True)
    after.resume(state, stop)
    assert after.state_dict().get("samples") == 4 * stop
    assert after.state_dict().get("truncated") == 2 * ((stop + 1) // 2)
    steps(after, clock, range(stop + 1, 13), every=4)
    assert without_waiting(written(stopped)) == without_waiting(written(whole))


def test_a_resume_with_other_processes_keeps_the_totals_and_counts_each_batch_once(tmp_path):
    first, second = (Metrics(tmp_path / "metrics.jsonl", WEIGHTS, writes=i == 0) for i in range(2))
    add(first, supervised=1.0)
    add(second, supervised=2.0)
    in_step(*(lambda r, m=m: m.line(dict(LOGS), step=1, epoch=0, reduce=r) for m in (first, second)))
    add(first, supervised=3.0)
    add(second, supervised=4.0)
    states = in_step(*(lambda r, m=m: m.state_dict(r) for m in (first, second)))
    assert states[0]["samples"] == states[1]["samples"] == 8
    resumed = [Metrics(tmp_path / "metrics.jsonl", WEIGHTS, writes=i == 0) for i in range(3)]
    for metrics in resumed:
        metrics.resume(states[0], 2)
        add(metrics, supervised=1.0)
    lines = in_step(*(lambda r, m=m: m.line(dict(LOGS), step=3, epoch=0, reduce=r) for m in resumed))
    assert {line["supervised"] for line in lines} == {(3 + 4 + 3 * 1.0) / 2}
    assert {line["samples"] for line in lines} == {14}
    assert [line["step"] for line in written(tmp_path / "metrics.jsonl")] == [1, 3]


def test_a_resume_drops_lines_of_steps_that_are_run_again_and_a_line_cut_short(path):
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    Metrics(path, WEIGHTS, writes=True).resume({}, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_process_that_does_not_write_leaves_the_file_alone(path):
    path.write_text('{"step": 1}\n{"step": 2}\n')
    Metrics(path, WEIGHTS, writes=False).resume({}, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_checkpoint_that_does_not_count_truncated_samples_resumes(path):
    before = Metrics(path, WEIGHTS, writes=True)
    add(before, samples=5)
    state = before.state_dict()
    del state["truncated"], state["since_line"]["truncated"]
    after = Metrics(path, WEIGHTS, writes=True)
    after.resume(json.loads(json.dumps(state)), 1)
    add(after, samples=2, truncated=1)
    line = after.line(dict(LOGS), step=2, epoch=0)
    assert (line["samples"], line["truncated"]) == (7, 1)


@pytest.mark.parametrize("text", ['{"step": 1}\n{"step" 2}\n', '{"step": "two"}\n', "[1}\n", '{"loss": 1}\n', "\udcff}\n"])
def test_a_damaged_file_is_named_with_the_way_out(path, text):
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"--resume: .*metrics.jsonl is damaged: remove it, or the lines"):
        Metrics(path, WEIGHTS, writes=True).resume({}, 2)
    assert path.read_bytes() == text.encode(errors="surrogateescape")


@pytest.mark.parametrize("state", [{"samples": "many"}, {"seconds": None}, {"since_line": 3}, {"since_line": {"loss": "x"}}])
def test_damaged_totals_of_a_checkpoint_are_named(path, state):
    with pytest.raises(CheckpointError, match=r"--resume: the totals of .* in the checkpoint are damaged"):
        Metrics(path, WEIGHTS, writes=True).resume(state, 2)
