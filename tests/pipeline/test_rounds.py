"""Rounds: the student answers, its answers are cached, it learns from them; each step can be stopped and continued."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from click.testing import CliRunner
from tiny_runs import GOLDEN, IMAGES, STUDENT, TEACHER, numbered, write_data

from alignkd.cli import main
from alignkd.errors import ConfigError, DataError
from alignkd.pipeline.config.rounds import RoundsConfig
from alignkd.pipeline.data.open_samples import chosen_by_key, open_samples
from alignkd.pipeline.rounds import run as rounds
from alignkd.pipeline.rounds.launch import StepError, command_line, run_command
from alignkd.pipeline.runtime.signals import Interrupted, StopFlag

SECTIONS = {
    "rounds": {"rounds": 2, "on-policy-share": 0.5},
    "cache-teacher": {"teacher": str(TEACHER), "vision-tower": str(GOLDEN / "clip"), "shard-samples": 4, "device": "cpu"},
    "answer": {"vision-tower": str(GOLDEN / "clip"), "max-new-tokens": 4, "keep-cut": True, "device": "cpu"},
    "distill": {
        "student": str(STUDENT),
        "vision-tower": str(GOLDEN / "clip"),
        "batch-size": 4,
        "learning-rate": 1.0e-3,
        "device": "cpu",
        "workers": 0,
    },
}


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data.json", numbered(12))


@pytest.fixture
def config(tmp_path, data):
    def made(**changes):
        given = {"data": str(data), "images": str(IMAGES), "out": str(tmp_path / "out"), "rounds": 2, "on_policy_share": 0.5}
        return RoundsConfig(**{**given, **changes})

    return made


def run_all(config, sections=SECTIONS):
    return rounds.run_rounds(config, "rounds.yaml", {name: value for name, value in sections.items() if name != "rounds"})


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """The steps that are run, by name, with their words; each leaves the records that its command leaves."""
    found: dict[str, list[str]] = {}

    def record(name, words, stop):
        stop.check()
        found[name] = list(words)
        out = tmp_path / "out"
        if "answers" in name:
            path = out / f"{name}.jsonl"
            path.write_text("{}\n")
            (path.parent / f"{path.name}.run").mkdir()
            (path.parent / f"{path.name}.run" / "result.json").write_text(json.dumps({"answers": 6, "images": str(IMAGES)}))
        if name.endswith("/run"):
            (out / name).mkdir()
            (out / name / "run.json").write_text("{}")
            figures = {"steps": 3, "samples": 12, "loss": 0.5, "terms": {}, "student": str(out / name / "student")}
            (out / name / "result.json").write_text(json.dumps(figures))

    monkeypatch.setattr(rounds, "run_command", record)
    return found


def option(words, name):
    return [words[i + 1] for i, word in enumerate(words) if word == name]


def test_each_round_answers_with_the_last_student_caches_its_answers_and_trains_it_on(config, steps, tmp_path):
    figures = run_all(config())
    out = tmp_path / "out"
    assert list(steps) == [
        "cache",
        *(f"round-{number}/{name}" for number in (1, 2) for name in ("answers-0", "cache", "run")),
    ]
    assert option(steps["round-1/answers-0"], "--model") == [str(STUDENT)]
    assert option(steps["round-2/answers-0"], "--model") == [str(out / "round-1" / "run" / "student")]
    assert option(steps["round-1/answers-0"], "--sample") == ["6"]
    assert option(steps["round-2/run"], "--cache") == [str(out / "cache"), str(out / "round-2" / "cache")]
    assert option(steps["round-2/run"], "--adapters-of") == [str(out / "round-1" / "run")]
    assert option(steps["round-2/cache"], "--calibration-from") == [str(out / "cache")]
    mixture = yaml.safe_load((out / "round-2" / "mixture.yaml").read_text())["datasets"]
    assert [(one["name"], one["weight"]) for one in mixture] == [("data.json", 0.5), ("answers to data.json", 1.0)]
    assert figures["student"] == str(out / "round-2" / "run" / "student")
    assert [one["answers"] for one in figures["rounds"]] == [6, 6]


def test_other_rounds_ask_other_prompts(config):
    samples = open_samples(config())
    chosen = [tuple(chosen_by_key(samples, 6, seed)) for seed in range(4)]
    assert len(set(chosen)) == 4
    assert all(len(set(one)) == 6 for one in chosen)


def test_what_was_done_is_not_done_again(config, steps, monkeypatch, tmp_path):
    recorded, stopped = rounds.run_command, []

    def stop_at_the_second_run(name, words, stop):
        if name == "round-2/run" and not stopped:
            stopped.append(name)
            (tmp_path / "out" / name).mkdir()
            (tmp_path / "out" / name / "run.json").write_text("{}")
            raise Interrupted(f"{name} was stopped")
        if name == "round-2/run":
            (tmp_path / "out" / name / "run.json").unlink()
            (tmp_path / "out" / name).rmdir()
        recorded(name, words, stop)

    monkeypatch.setattr(rounds, "run_command", stop_at_the_second_run)
    with pytest.raises(Interrupted):
        run_all(config())
    steps.clear()
    figures = run_all(config(resume=True))
    assert list(steps) == ["round-2/run"]
    assert steps["round-2/run"][-1] == "--resume"
    assert len(figures["rounds"]) == 2
    steps.clear()
    assert run_all(config(resume=True)) == figures
    assert not steps


def test_rounds_of_other_settings_are_refused(config, steps):
    run_all(config())
    with pytest.raises(ConfigError, match="already holds rounds: continue them with --resume"):
        run_all(config())
    with pytest.raises(ConfigError, match=r"other settings: rounds: 2 before, 3 here"):
        run_all(config(resume=True, rounds=3))


def test_a_share_of_no_sample_is_refused(config):
    with pytest.raises(DataError, match=r"--on-policy-share 0\.01 of 12 samples is no sample"):
        run_all(config(on_policy_share=0.01))


def test_answers_alone_need_no_cache_of_the_data_in_training(config, steps, tmp_path):
    run_all(config(on_policy_share=1.0, rounds=1))
    assert option(steps["round-1/run"], "--cache") == [str(tmp_path / "out" / "round-1" / "cache")]


def test_a_step_that_fails_says_so_and_one_that_is_stopped_may_be_continued(tmp_path):
    ending = ["python", "-c", "import sys; sys.exit({})"]

    def run(code):
        run_command("step", [*ending[:2], ending[2].format(code)], StopFlag())

    run(0)
    with pytest.raises(StepError, match="step ended with exit code 2; its message is above"):
        run(2)
    with pytest.raises(Interrupted, match="--resume"):
        run(75)
    with pytest.raises(ConfigError, match=r"cannot be started: .* check --launch"):
        run_command("step", [str(tmp_path / "no such program")], StopFlag())


def test_a_signal_reaches_the_step_once_and_its_end_is_waited_for(tmp_path):
    program = (
        "import pathlib, signal, sys, time\n"
        f"path = pathlib.Path({str(tmp_path)!r})\n"
        "def end(*_):\n    (path / 'ended').write_text('once'); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, end)\n(path / 'begun').write_text('')\ntime.sleep(60)\n"
    )

    class WhenItHasBegun(StopFlag):
        def check(self):
            pass

        def __bool__(self):
            return (tmp_path / "begun").exists()

    with pytest.raises(Interrupted):
        run_command("step", ["python", "-c", program], WhenItHasBegun())
    assert (tmp_path / "ended").read_text() == "once"


def test_launch_puts_its_words_before_the_module():
    words = command_line("torchrun --nproc-per-node 2 -m", ["answer"])
    assert words == ["torchrun", "--nproc-per-node", "2", "-m", "alignkd", "answer"]
    with pytest.raises(ConfigError, match="--launch"):
        command_line("'torchrun", [])


WRONG = {
    "no file": (None, "alignkd rounds takes the options of its commands from --settings FILE.yaml"),
    "no teacher": ({**SECTIONS, "cache-teacher": {}}, "section cache-teacher has no teacher"),
    "an unknown option": ({**SECTIONS, "distill": {"student": "s", "batchsize": 3}}, "batchsize cannot be set for distill"),
    "a value out of range": ({**SECTIONS, "answer": {"temperature": -1}}, "temperature: "),
    "an unknown section": ({**SECTIONS, "distil": {}}, r"unknown distil \(did you mean distill\?\)"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_in_a_section_is_said_before_the_first_step(kind, tmp_path, data, steps):
    sections, words = WRONG[kind]
    given = [] if sections is None else ["--settings", str(tmp_path / "rounds.yaml")]
    if sections is not None:
        (tmp_path / "rounds.yaml").write_text(yaml.safe_dump(sections))
    result = CliRunner().invoke(main, ["rounds", "--data", str(data), "--out", str(tmp_path / "out"), *given])
    assert result.exit_code == 2
    assert re.search(words, " ".join(result.output.split()))
    assert not steps
