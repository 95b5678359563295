"""The door: click commands, no logic. Heavy imports happen inside the commands, so that ``--help`` answers at once."""

import contextlib
import dataclasses
import json
import sys
from typing import Any

import click

from alignkd import __version__
from alignkd.pipeline.commands import options

_ATTENTION_CODECS = click.Choice(["sqrt8", "sqrt4", "float16", "int8-rows", "exact"])
_VISION_CODECS = click.Choice(["int8-rows", "int4-blocks", "float16", "exact"])


class BadInput(click.ClickException):
    """A message for the user; exit code 2."""

    exit_code = 2


class _Door(click.Group):
    """Turns the errors that are the user's to mend into one message, and an orderly early end into exit code 75."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of our output left; click ends quietly
            raise
        except (ValueError, KeyError, OSError) as error:
            if ctx.find_root().params.get("debug"):
                raise
            raise BadInput(str(error)) from error
        except Exception as error:
            from alignkd.pipeline.runtime.signals import RESUMABLE_EXIT_CODE, Interrupted

            if isinstance(error, Interrupted):
                click.echo(str(error), err=True)
                ctx.exit(RESUMABLE_EXIT_CODE)
            raise


@click.group(cls=_Door, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="alignkd")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:  # noqa: ARG001
    """Distil a large vision-language model into a small one, from a cache of the teacher's targets.

    \b
    Example:
      alignkd cache-teacher --teacher MobileVLM_V2-7B --data train.json --images images --cache cache
      alignkd distill --student MobileVLM_V2-1.7B --cache cache --data train.json --images images --out run
    """
    _quiet_transformers()


def _quiet_transformers() -> None:
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _print(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(figures, default=str))
        return
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        click.echo(f"{name.replace('_', ' '):<{width}}  {_words(name, value)}")


def _words(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(name, item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(_words("", item) for item in value) or "none"
    if "bytes" in name and isinstance(value, int | float):
        return _size(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.1f} {unit}" if unit != "B" else f"{count:,.0f} B"
        count /= 1000
    return f"{count:,.1f} TB"


@main.command("cache-teacher", cls=options.CommandWithSettings)
@click.option("--teacher", required=True, help="Folder of the teacher's checkpoint.")
@options.data
@click.option("--cache", required=True, help="Where the cache is written: a folder, or a URL such as s3://bucket/cache.")
@options.settings
@options.template
@click.option("--max-length", default=2048, help="Token ids a sample may have (an image counts as one); longer ones are cut.")
@click.option("--format", "shard_format", type=options.FORMATS, default=options.DEFAULT_FORMAT, help="Shard format.")
@click.option("--targets", default="attention,vision,logits", help="Comma-separated targets to cache.")
@click.option(
    "--attention", type=click.Choice(["per-head", "mean"]), default="per-head", help="Keep every head, or their mean."
)
@click.option(
    "--attention-layers",
    default="first",
    help="Layers whose attention is kept: first, last, middle, all, or such as 0,15,31; with @24, those that a student of 24"
    " layers needs.",
)
@click.option(
    "--alignment",
    type=click.Choice(["targets", "slice"]),
    default="targets",
    help="Keep attention and vision tokens of every sample, or once the part of the teacher they are recomputed from.",
)
@options.switch("slice-without-tower", "With --alignment slice: leave out the vision tower, which the student shares.")
@click.option(
    "--logits",
    type=click.Choice(["topk", "sampled", "sketch", "hidden"]),
    default="sketch",
    help="What is kept of an answer token's distribution: see docs/cache-size.md.",
)
@click.option("--top-k", type=click.IntRange(min=1), default=16, help="Tokens kept with their log-probability.")
@click.option("--draws", type=click.IntRange(min=1), default=8, help="sampled: tokens drawn from the rest.")
@click.option("--sketch-bytes", type=click.IntRange(min=1), default=64, help="sketch: bytes that give the rest its shape.")
@click.option("--hidden-bits", type=click.Choice(["8", "16"]), default="8", help="hidden: bits of each feature.")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=1.0, help="Temperature of the logits.")
@click.option(
    "--logit-vocabulary",
    type=click.IntRange(min=1),
    help="Keep the distribution over so many first ids, for a student of fewer tokens. [default: all of the teacher's head]",
)
@click.option("--attention-codec", type=_ATTENTION_CODECS, default="sqrt8", help="How attention is stored.")
@click.option("--vision-codec", type=_VISION_CODECS, default="int8-rows", help="How vision tokens are stored.")
@click.option("--shard-samples", type=click.IntRange(min=1), default=512, help="Samples a shard: the unit of work and resume.")
@click.option("--batch-tokens", type=click.IntRange(min=1), default=16_384, help="Positions a forward pass, padding included.")
@click.option("--dtype", type=options.DTYPES, default="float32", help="Dtype of the teacher.")
@options.max_rejected
@options.machine
@click.option("--rank", type=click.IntRange(min=0), help="This worker. [default: from torchrun, SLURM or Kubernetes, else 0]")
@click.option("--world-size", type=click.IntRange(min=1), help="Number of workers. [default: likewise, else 1]")
@options.switch("steal", "When its own shards are done, take those that other workers have not done yet.")
@click.option("--host-threads", type=click.IntRange(min=1), default=4, help="Threads that read images ahead of the teacher.")
@click.option("--engine", type=click.Choice(["process", "ray"]), default="process", help="Who hands out the shards.")
@click.option("--ray-workers", type=click.IntRange(min=1), help="Ray actors, each with a teacher. [default: one a GPU, or one]")
@click.option("--ray-address", help="Of a running Ray cluster. [default: the one Ray finds, or a local one]")
@click.option("--dry-run", "only_estimate", is_flag=True, help="Plan, size and time from a few real samples; write nothing.")
@options.as_json
def cache_teacher_command(
    targets: str,
    attention: str,
    logits: str,
    top_k: int,
    draws: int,
    sketch_bytes: int,
    hidden_bits: str,
    temperature: float,
    logit_vocabulary: int | None,
    attention_codec: str,
    vision_codec: str,
    engine: str,
    ray_workers: int | None,
    ray_address: str | None,
    only_estimate: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Stage one: run the teacher once and write its targets.

    Running it again goes on where it stopped. Any number of workers may write one cache: see docs/cluster.md.

    \b
    Example:
      alignkd cache-teacher --teacher MobileVLM_V2-7B --data train.json --images images --cache cache --dtype bfloat16
    """
    from alignkd.pipeline.config.cache_layout import TARGETS
    from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
    from alignkd.pipeline.config.targets import TargetSettings
    from alignkd.targets.logits import LogitSettings

    chosen = tuple(name.strip() for name in targets.split(",") if name.strip())
    unknown = [name for name in chosen if name not in TARGETS]
    if unknown or not chosen:
        raise BadInput(f"--targets {targets}: known are {', '.join(TARGETS)}")
    answers = LogitSettings(logits, top_k, draws, sketch_bytes, int(hidden_bits), temperature, logit_vocabulary)
    settings = TargetSettings(chosen, attention, answers, attention_codec, vision_codec)
    config = CacheTeacherConfig(settings=settings, **given)
    if only_estimate:
        from alignkd.pipeline.stage_one.dry_run import dry_run

        _print(dry_run(config), as_json)
    elif engine == "ray":
        from alignkd.pipeline.stage_one.ray_workers import cache_teacher_on_ray

        _print(cache_teacher_on_ray(config, workers=ray_workers, address=ray_address), as_json)
    else:
        from alignkd.pipeline.stage_one.worker import cache_teacher

        _print(cache_teacher(config), as_json)


@main.group()
def cache() -> None:
    """Look into a cache: its progress, its soundness, its rows."""


@cache.command("status")
@click.argument("url")
@click.option(
    "--rejected", "rejected_file", type=click.Path(), help="Write every rejected sample and its reason to a JSONL file."
)
@options.as_json
def cache_status(url: str, rejected_file: str | None, as_json: bool) -> None:
    """Progress: shards and samples done and left, bytes by field, rate, time left, rejected samples. It may be running.

    \b
    Example:
      alignkd cache status cache --rejected rejected.jsonl
    """
    from alignkd.cache_store.protocol.store import open_store
    from alignkd.pipeline.cache_admin.status import status_figures

    figures = status_figures(open_store(url))
    if rejected_file is not None:
        with open(rejected_file, "w") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in figures["rejected"])
    _print(figures, as_json)


@cache.command("verify")
@click.argument("url")
@click.option("--quick", is_flag=True, help="Compare records and sizes only; no content digest.")
@options.as_json
def cache_verify(url: str, quick: bool, as_json: bool) -> None:
    """Audit a cache; the last line is a digest of its content.

    The digest covers every row's key and values, whatever the sharding, order, time or format. Exit code 2 when anything
    is wrong.

    \b
    Example:
      alignkd cache verify cache
    """
    from alignkd.pipeline.cache_admin.audit import verify_with_progress

    report = verify_with_progress(url, quick=quick)
    figures = dataclasses.asdict(report) | {"incomplete": report.incomplete}
    if as_json:
        click.echo(json.dumps(figures))
    else:
        _print({k: v for k, v in figures.items() if k not in ("problems", "content_sha256")}, as_json=False)
        for problem in report.problems:
            click.echo(f"problem: {problem}")
        click.echo(f"content sha256: {report.content_sha256 or '(not computed: --quick)'}")
    if report.problems:
        sys.exit(2)


@cache.command("repair")
@click.argument("url")
@click.option(
    "--min-age",
    type=click.FloatRange(min=0),
    default=3600.0,
    help="Seconds; younger strays stay, as a running worker may be about to commit them.",
)
@options.as_json
def cache_repair(url: str, min_age: float, as_json: bool) -> None:
    """Drop everything that verify finds wrong, and sweep what crashes left; cache-teacher then rebuilds what is missing.

    \b
    Example:
      alignkd cache repair cache
    """
    from alignkd.cache_store.protocol.repair import repair

    report = repair(url, min_age_s=min_age)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
        return
    for problem in report.problems:
        click.echo(f"problem: {problem}")
    for name in report.removed:
        click.echo(f"removed: {name}")
    click.echo(f"shards to do: {report.shards_to_do}" + ("; run alignkd cache-teacher again" if report.shards_to_do else ""))


@cache.command("convert")
@click.argument("source")
@click.argument("target")
@click.option(
    "--format", "shard_format", type=options.FORMATS, help="Format of the target. [default: the one the source is not]"
)
@options.as_json
def cache_convert(source: str, target: str, shard_format: str | None, as_json: bool) -> None:
    """Copy a cache into the other shard format; the content sha256 stays the same. Resumes where it stopped.

    \b
    Example:
      alignkd cache convert cache s3://bucket/cache
    """
    from alignkd.pipeline.cache_admin.audit import convert_with_progress
    from alignkd.pipeline.cache_admin.status import status_figures

    _print(status_figures(convert_with_progress(source, target, shard_format)), as_json)


@cache.command("inspect")
@click.argument("url")
@click.option("--id", "sample_id", help="Decode the row of this sample.")
@click.option("--save", help="Write the row's arrays to an .npz file.")
@click.option("--plot", help="Draw the row's attention to a .png file.")
@options.as_json
def cache_inspect(url: str, sample_id: str | None, save: str | None, plot: str | None, as_json: bool) -> None:
    """The specification and fingerprint, or one row decoded, in words and as a picture.

    \b
    Example:
      alignkd cache inspect cache --id 000123 --save row.npz --plot row.png
    """
    from alignkd.cache_store.protocol.reader import CacheReader

    reader = CacheReader(url)
    if sample_id is None:
        if save or plot:
            raise BadInput("--save and --plot need --id: they are about one row")
        specification = {"shard_format": reader.shard_format, **reader.spec.to_dict()}
        click.echo(json.dumps(specification, indent=None if as_json else 2))
        return
    import numpy as np

    from alignkd.pipeline.cache_admin.row import find_row, plot_row, row_arrays, row_figures

    row = find_row(reader, sample_id)
    if save:
        np.savez(save, **row_arrays(reader, row))  # type: ignore[arg-type]
    if plot:
        plot_row(reader, row, plot)
    _print(row_figures(reader, row), as_json)


@main.command("distill", cls=options.CommandWithSettings)
@click.option("--student", required=True, help="Folder of the student's checkpoint.")
@click.option("--cache", help="The cache that cache-teacher wrote. Not needed by recipes without a teacher (sft).")
@options.data
@click.option("--out", required=True, help="Folder of the run.")
@options.settings
@click.option(
    "--recipe",
    default="align-kd",
    help="align-kd, paper, sft, logits-only, llavadi-forward, llavadi-reverse, llavadi-js, compodistill, beta-kd (see"
    " docs/method.md), or a FILE.yaml.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a field of the recipe; may be repeated.")
@options.template
@click.option("--max-length", type=click.IntRange(min=2), help="Token ids a sample may have. [default: the cache's]")
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), default=1.0, help="Passes over the data.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Optimizer steps, instead of --epochs.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Samples a batch and device. [default: 16, or as many as --batch-tokens holds]",
)
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Positions a batch and device, padding included.")
@options.switch("group-by-length", "Batches of samples of like length: less padding.")
@click.option("--gradient-accumulation", type=click.IntRange(min=1), default=1, help="Batches a step.")
@click.option("--learning-rate", type=float, default=4e-5, help="Peak learning rate; cosine to zero.")
@click.option("--projector-learning-rate", type=float, help="The projector's own. [default: --learning-rate]")
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "muon"]),
    default="adamw",
    help="muon: for matrices of layers; adamw for the rest.",
)
@click.option("--muon-learning-rate", type=float, default=0.02, help="Muon's peak learning rate.")
@click.option("--warmup", type=click.FloatRange(min=0, max=0.999), default=0.03, help="Share of the steps.")
@click.option("--weight-decay", type=float, default=0.0, help="The optimizer's.")
@click.option("--seed", type=int, default=0, help="Of the order, dropout and the adapters' start.")
@click.option("--dtype", type=options.DTYPES, default="float32", help="Dtype of the computation, beside float32 weights.")
@options.switch("gradient-checkpointing", "Less memory, a third more time.")
@click.option("--deepspeed", metavar="NAME|FILE.json", help="ZeRO for many GPUs: zero1, zero2, zero3, or a FILE.json.")
@options.switch(
    "lora", "Train low-rank updates of the decoder's layers, with projector and adapters, and merge them at the end."
)
@click.option("--lora-rank", type=click.IntRange(min=1), default=64, help="Rank of the updates.")
@click.option("--lora-alpha", type=click.IntRange(min=1), default=128, help="Alpha / rank multiplies the updates.")
@click.option(
    "--lora-dropout", type=click.FloatRange(min=0, max=1, max_open=True), default=0.0, help="Dropout before the updates."
)
@click.option(
    "--online-teacher", metavar="DIR", help="Run this teacher in the loop instead of reading its targets from a cache."
)
@click.option("--teacher-dtype", type=options.DTYPES, help="Dtype of the online teacher. [default: --dtype]")
@options.switch("cache-tower-features", "Keep the frozen tower's features of all images in memory.")
@click.option("--save-steps", type=click.IntRange(min=1), default=500, help="Steps between checkpoints.")
@click.option("--save-total-limit", type=click.IntRange(min=2), default=2, help="Checkpoints kept.")
@click.option("--log-steps", type=click.IntRange(min=1), default=10, help="Steps between lines of metrics.jsonl.")
@click.option(
    "--report-to", multiple=True, default=("tensorboard",), help="Tracker, as transformers names it, or none; may be repeated."
)
@options.switch("term-gradients", "Show the gradient norm of each term in every log line.")
@click.option("--workers", type=click.IntRange(min=0), help="Loader processes. [default: 4 with a GPU, else 0]")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out.")
@options.max_rejected
@options.machine
@options.as_json
def distill_command(recipe: str, overrides: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Stage two: train the student from the cache; the teacher is never loaded.

    \b
    Example:
      alignkd distill --student MobileVLM_V2-1.7B --cache cache --data train.json --images images --out run
    """
    from alignkd.losses.recipes import get_recipe

    pairs = [text.partition("=") for text in overrides]
    wrong = [text for text, (_, equals, _) in zip(overrides, pairs, strict=True) if not equals]
    if wrong:
        raise BadInput(f"--set {wrong[0]}: expected key=value")
    chosen = get_recipe(recipe, {key: value for key, _, value in pairs})
    from alignkd.pipeline.config.distill import DistillConfig
    from alignkd.pipeline.training.run import distill

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to standard output, which is for figures
        figures = distill(DistillConfig(recipe=chosen, **given))
    if figures:  # of several processes, the first one reports
        _print(figures, as_json)


@main.command("show")
@click.option("--model", required=True, help="Folder of a checkpoint.")
@options.data
@click.option("--id", help="Which sample. [default: the first]")
@options.template
@click.option("--max-length", type=click.IntRange(min=2), default=2048, help="Token ids a sample may have.")
@click.option("--save", help="Write the arrays to an .npz file.")
@click.option("--plot", help="Draw the attention over the image to a .png file.")
@click.option("--dtype", type=options.DTYPES, default="float32", help="Dtype of the model.")
@options.machine
@options.as_json
def show_command(as_json: bool, **given: Any) -> None:
    """One sample as the model sees it: its tokens, and where the text looks.

    \b
    Example:
      alignkd show --model MobileVLM_V2-1.7B --data train.json --images images --id 000123 --plot attention.png
    """
    from alignkd.pipeline.config.show import ShowConfig
    from alignkd.pipeline.evaluate.show_sample import show

    shown = show(ShowConfig(**given))
    if as_json:
        click.echo(json.dumps({**shown.figures, "tokens": shown.tokens}))
        return
    click.echo("position      id  place         supervised  piece")
    for token in shown.tokens:
        mark = "yes" if token["supervised"] else ""
        click.echo(f"{token['position']:8d}  {token['id']:6d}  {token['place']:<12}  {mark:<10}  {token['piece']}")
    _print(shown.figures, as_json=False)


@main.command("models")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def models_command(as_json: bool) -> None:
    """List the families of models, what each supports, and why not.

    \b
    Example:
      alignkd models
    """
    from alignkd.pipeline.commands.models_table import OTHERS, list_models, models_text

    found = list_models()
    click.echo(json.dumps({"families": found, "others": OTHERS}) if as_json else models_text(found))


@main.command("evaluate")
@click.option("--model", required=True, help="Folder of a checkpoint.")
@options.data
@click.option("--metric", type=click.Choice(["exact", "contains"]), default="exact", help="How answers are compared.")
@click.option("--out", help="Folder for predictions and result.")
@options.template
@click.option("--batch-size", type=click.IntRange(min=1), default=64, help="Questions at a time.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, help="Longest answer.")
@click.option("--dtype", type=options.DTYPES, default="float32", help="Dtype of the model.")
@options.max_rejected
@options.machine
@options.as_json
def evaluate_command(as_json: bool, **given: Any) -> None:
    """Accuracy of a model on a question file, by generation.

    The last answer of each conversation is generated and compared with the one in the file.

    \b
    Example:
      alignkd evaluate --model run/student --data test.json --images images --out run/test
    """
    from alignkd.pipeline.config.evaluate import EvaluateConfig
    from alignkd.pipeline.evaluate.runner import evaluate

    _print(evaluate(EvaluateConfig(**given)), as_json)


@main.command("demo")
@click.option("--out", required=True, help="Folder for everything the demo makes.")
@click.option("--seed", type=int, default=0, help="Of the teacher, the students and the choice of labelled images.")
@click.option(
    "--format", "shard_format", type=options.FORMATS, default=options.DEFAULT_FORMAT, help="Shard format of the cache."
)
@click.option("--device", help="cpu, cuda ... [default: the GPU where there is one]")
@options.as_json
def demo_command(out: str, seed: int, shard_format: str, device: str | None, as_json: bool) -> None:
    """The whole path on easy-VQA, from image-text pairs to a distilled student, with a report.

    \b
    Example:
      alignkd demo --out demo
    """
    from alignkd.pipeline.demo import DemoConfig, demo

    result = demo(DemoConfig(out=out, seed=seed, device=device, shard_format=shard_format))
    click.echo(json.dumps(result.figures) if as_json else result.text)


if __name__ == "__main__":
    main()
