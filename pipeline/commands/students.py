"""``alignkd new-student`` and ``alignkd push``."""

from pathlib import Path
from typing import Any

import click

from alignkd.pipeline.commands.options import job_command as options
from alignkd.pipeline.commands.options.from_config import from_options, options_of
from alignkd.pipeline.commands.output.printing import print_figures
from alignkd.pipeline.config.students import NewStudentConfig, PushConfig


@click.command("new-student", cls=options.JobCommand, short_help="A student of a language model, a tower and a new projector.")
@options_of(NewStudentConfig)
@options.as_json
def new_student_command(as_json: bool, **given: Any) -> None:
    """Make the folder of a student that was not trained yet: a language model, a vision tower and a new projector.

    \b
    Example:
      alignkd new-student --language-model MobileLLaMA-1.4B-Chat --tower clip-vit-large-patch14-336 --out student-start
    """
    config = from_options(NewStudentConfig, given)
    from alignkd.pipeline.hub.new_student import new_student

    print_figures(new_student(config), as_json)


@click.command("push", cls=options.JobCommand, short_help="Publish a student with its model card.")
@click.argument("run")
@click.argument("repo", required=False)
@options_of(PushConfig)
@options.as_json
def push_command(run: str, repo: str | None, as_json: bool, **given: Any) -> None:
    """Publish the student of a training run with its model card: recipe, data, teacher, cache, and scores with intervals.

    RUN is a folder that alignkd distill wrote, REPO is ORG/NAME on the Hugging Face Hub (log in with: hf auth login). With
    --folder nothing leaves the machine, and REPO may be left out.

    \b
    Example:
      alignkd push run my-org/MobileVLM-1.7B-distilled --benchmarks scores --license apache-2.0
      alignkd push run --folder published
    """
    config = from_options(PushConfig, given, run=run, repo=repo)
    from alignkd.pipeline.hub.push import Training, push
    from alignkd.pipeline.report.benchmarks.card_scores import card_scores
    from alignkd.pipeline.report.runs.reading import read_runs
    from alignkd.pipeline.training.evaluation.best import read_best

    (found,) = read_runs([config.run])
    training = Training(found.record, found.result, read_best(Path(config.run)) if config.best else None)
    print_figures(push(config, training, card_scores(config.benchmarks)), as_json)
