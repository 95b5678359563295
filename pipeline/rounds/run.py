"""``alignkd rounds``: on-policy distillation without the teacher in memory.

Each round: 1. the student answers a share of the prompts; 2. the teacher's targets for those answers are cached; 3. the student
is trained on a mixture of the data and its own answers. Each is a command of alignkd that can be stopped and continued, so the
rounds can. Models are never in memory together, nor two of them in one process.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignkd.errors import DataError
from alignkd.pipeline.config.rounds import RoundsConfig
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.data.mixture.mixed import MixedSamples
from alignkd.pipeline.data.open_samples import check_images, open_samples, sources_of
from alignkd.pipeline.rounds.launch import command_line, run_command
from alignkd.pipeline.rounds.state import State
from alignkd.pipeline.rounds.steps import Counted, Plan, Step
from alignkd.pipeline.runtime.files import check_out_folder, replace_text
from alignkd.pipeline.runtime.logs import log_start
from alignkd.pipeline.runtime.out_folder.lock import held
from alignkd.pipeline.runtime.run_record import write_run_record
from alignkd.pipeline.runtime.signals import StopFlag, stop_on_signals
from alignkd.plain_files import read_plain

_LARGEST = 64 * 2**20
_MAY_CHANGE = ("resume", "out", "launch")
_log = logging.getLogger(__name__)


def run_rounds(config: RoundsConfig, settings: str, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Run all steps that are not done yet; returns the figures of every round.

    ``settings``: the file whose ``sections`` the commands take their options from.

    Raises:
        AlignkdError: bad input, other settings than those of the folder, or a step that failed.
        Interrupted: a signal came; the same command with ``resume`` continues.
    """
    out = Path(config.out)
    check_out_folder(out)
    check_images(config)
    with stop_on_signals() as stop, held(out, stop.check):
        state = State(out, _record(config, sections))
        state.begin(resume=config.resume)
        plan = _plan(config, sections)
        steps = plan.steps()
        write_run_record(out / "run.json", "rounds", asdict(config) | {"settings": settings, "sections": sections})
        log_start(
            "rounds",
            student=plan.student,
            teacher=plan.teacher,
            data=f"{config.data_words} ({sum(count for _, count in plan.data):,} samples)",
            images=config.images_words,
            plan=f"{config.rounds} rounds, {config.on_policy_share:.0%} of the prompts in each; {len(state.done)} of"
            f" {len(steps)} steps are done",
            out=config.out,
        )
        for step in steps:
            if step.name not in state.done:
                _run(step, config, settings, sections, stop)
                state.mark(step.name)
        figures = _figures(plan)
        replace_text(out / "result.json", json.dumps(figures, indent=2) + "\n")
        return figures


def _record(config: RoundsConfig, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a resumed run must be asked for, too."""
    return {name: value for name, value in asdict(config).items() if name not in _MAY_CHANGE} | {"sections": sections}


def _plan(config: RoundsConfig, sections: dict[str, dict[str, Any]]) -> Plan:
    teacher, student = sections["cache-teacher"]["teacher"], sections["distill"]["student"]
    samples = open_samples(config)
    data = _counted(config, samples)
    if not any(round(config.on_policy_share * count) for _, count in data):
        raise DataError(
            f"--on-policy-share {config.on_policy_share:g} of {len(samples):,} samples is no sample: give a larger share, or"
            " more data"
        )
    return Plan(config, data, teacher, student, sampled="temperature" in sections.get("answer", {}))


def _counted(config: RoundsConfig, samples: Samples) -> Counted:
    sources = sources_of(config)
    parts = samples.parts if isinstance(samples, MixedSamples) else [samples]
    return [(source, len(part.unique())) for source, part in zip(sources, parts, strict=True)]


def _run(step: Step, config: RoundsConfig, settings: str, sections: dict[str, dict[str, Any]], stop: StopFlag) -> None:
    step.prepare()
    words = [step.command, *(("--settings", settings) if sections.get(step.command) else ()), *step.arguments]
    if step.command == "distill" and (step.folder / "run" / "run.json").exists():
        words.append("--resume")
    run_command(step.name, command_line(config.launch, words), stop)


def _figures(plan: Plan) -> dict[str, Any]:
    """What each round gave, from the records that its steps left."""
    rounds = []
    for number in range(1, plan.config.rounds + 1):
        folder = plan.folder(number)
        run = _json(folder / "run" / "result.json")
        answers = [_json(Path(f"{path}.run") / "result.json") for path in sorted(folder.glob("answers-*.jsonl"))]
        rounds.append(
            {
                "round": number,
                "answers": sum(int(one.get("answers", 0)) for one in answers),
                "steps": run.get("steps"),
                "samples": run.get("samples"),
                "loss": run.get("loss"),
                "terms": run.get("terms"),
                "student": run.get("student"),
            }
        )
    return {"out": plan.config.out, "rounds": rounds, "student": rounds[-1]["student"]}


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(read_plain(path, _LARGEST))
    return found if isinstance(found, dict) else {}
