"""Where the text looks before and after training: the student at its start and the trained one, on a run's samples."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignkd.errors import AlignkdError
from alignkd.pipeline.config.report import ReportConfig
from alignkd.pipeline.config.shared import DEFAULT_MAX_LENGTH, DataSettings
from alignkd.pipeline.hub.models import is_here, pin_model
from alignkd.pipeline.report.attention_grid import Column, Seen, attention_grid, head_grid
from alignkd.pipeline.report.page import Html, Text, heading, missing, section, small
from alignkd.pipeline.report.runs.run import Run
from alignkd.pipeline.report.words import short

if TYPE_CHECKING:
    from alignkd.pipeline.data.sample import Sample

TITLE = "Where the text looks"
CAPTION = (
    "First-layer attention from the text after the image to the image's vision tokens, averaged over heads and text rows; the"
    " share of all attention that falls on the image below each panel."
)
HEADS_CAPTION = "The heads of the first sample, in their order, with a scale of their own; the share of each on the image."


def attention_section(runs: Sequence[Run], config: ReportConfig) -> tuple[Html, dict[str, Any]]:
    """Pictures where models and data are still there; else why not."""
    if config.samples == 0:
        return section(TITLE, missing("left out, as --samples 0 asked")), {}
    groups, notes = list[tuple[list[str], dict[str, Column]]](), list[Text]()
    for place in dict.fromkeys(_place(run, config) for run in runs):
        of_place = [run for run in runs if _place(run, config) == place]
        try:
            groups.append(_group(of_place, place, config, named=len(runs) > 1))
        except (AlignkdError, OSError) as error:
            names = f"{', '.join(run.name for run in of_place)}: " if len(runs) > 1 else ""
            notes.append(missing(f"{names}{short(error)}; where the data is elsewhere, give --data and --images"))
    grid = attention_grid(groups) if groups else ""
    return section(TITLE, *notes, grid, small(CAPTION) if groups else "", *_heads(groups)), _figures(groups)


def _place(run: Run, config: ReportConfig) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """The data of a run, its image folders, and whether turns were merged."""
    data = (config.data,) if config.data else run.local_paths("data")
    images = (config.images,) if config.images else run.local_paths("images")
    return data, images, run.settings.get("merge_turns") is True


def _group(
    runs: Sequence[Run], place: tuple[tuple[str, ...], tuple[str, ...], bool], config: ReportConfig, *, named: bool
) -> tuple[list[str], dict[str, Column]]:
    # Only here: torch takes seconds to import, and a page without these pictures does not need it.
    from alignkd.pipeline.report.attention_maps import choose_samples

    data, images, merge_turns = place
    if not data:
        raise AlignkdError("run.json names no data on this machine")
    samples = choose_samples(DataSettings(data=data, images=images or None, merge_turns=merge_turns), config.samples)
    columns, starts = dict[str, Column](), dict[tuple[object, ...], str]()
    for run in runs:
        start = (run.setting("student"), run.settings.get("template"))
        if start not in starts:
            starts[start] = (
                f"{run.name}, at the start" if named and len({r.setting("student") for r in runs}) > 1 else "at the start"
            )
            columns[starts[start]] = _column(run, run.setting("student"), samples, config)
        columns[f"{run.name}, trained" if named else "trained"] = _column(run, str(run.student), samples, config)
    return [_asked(sample) for sample in samples], columns


def _column(run: Run, folder: str | None, samples: Sequence["Sample"], config: ReportConfig) -> Column:
    from alignkd.pipeline.report.attention_maps import Prompting, look

    if folder is not None and config.download:
        folder = pin_model(folder, may_download=True)
    if folder is None or not is_here(folder):
        trained = folder == str(run.student)
        why = "it is written when the run ends" if trained and run.result is None else f"{folder} is not there"
        return [why] * len(samples)
    length = run.settings.get("max_length")
    prompting = Prompting(
        template=run.setting("template"),
        max_length=length if isinstance(length, int) and length > 1 else DEFAULT_MAX_LENGTH,
        prompt_date=run.setting("prompt_date"),
        vision_tower=config.vision_tower or run.setting("vision_tower"),
        device=config.device,
        dtype=config.dtype,
    )
    try:
        return look(folder, samples, prompting)
    except (AlignkdError, OSError) as error:
        return [short(error)] * len(samples)


def _asked(sample: "Sample") -> str:
    asked = [text for speaker, text in sample.turns if speaker == "human"]
    answered = [text for speaker, text in sample.turns if speaker == "gpt"]
    more = f" (the first of {len(sample.images)} images)" if len(sample.images) > 1 else ""
    question = " ".join(asked[0].replace("<image>", "").split()) if asked else ""
    return f"{short(sample.id, 60)}: {short(question, 160)} – {short(answered[0] if answered else '', 160)}{more}"


def _heads(groups: Sequence[tuple[Sequence[str], Mapping[str, Column]]]) -> list[Html]:
    for asked, columns in groups:
        for place, text in enumerate(asked):
            seen = {name: one for name, column in columns.items() if isinstance(one := column[place], Seen)}
            if any(len(one.attention_HTV) > 1 for one in seen.values()):
                return [heading("Head by head", 3), small(HEADS_CAPTION), head_grid(text, seen)]
    return []


def _figures(groups: Sequence[tuple[Sequence[str], Mapping[str, Column]]]) -> dict[str, Any]:
    """The share of attention on the image, by model; None where there is none."""
    return {
        name: [one.share if isinstance(one, Seen) else None for one in column]
        for _, columns in groups
        for name, column in columns.items()
    }
