"""``alignkd benchmark report``: several runs of the benchmarks, as one page and one table."""

from pathlib import Path
from typing import Any

from alignkd.pipeline.config.benchmark_report import BenchmarkReportConfig
from alignkd.pipeline.report.benchmarks.bars import STYLE
from alignkd.pipeline.report.benchmarks.comparison import compare
from alignkd.pipeline.report.benchmarks.differing import differing_questions
from alignkd.pipeline.report.benchmarks.differing_section import differing_section
from alignkd.pipeline.report.benchmarks.figures import figures_of, interval_words, score_words
from alignkd.pipeline.report.benchmarks.markdown import markdown_table
from alignkd.pipeline.report.benchmarks.out_folders import read_models
from alignkd.pipeline.report.benchmarks.sections import (
    categories_section,
    method_section,
    pairs_section,
    published_section,
    scores_section,
    settings_section,
)
from alignkd.pipeline.report.benchmarks.warnings import warnings_of
from alignkd.pipeline.report.page import heading, page, paragraph, write_page
from alignkd.pipeline.runtime.files import check_out_folder


def benchmark_report(config: BenchmarkReportConfig) -> dict[str, Any]:
    """Write ``report.html`` and ``report.md`` into ``config.to``; returns the figures that they show.

    Raises:
        ConfigError: no folder is given, one is given twice, or ``to`` cannot be written.
        DataError: a folder is no output of ``alignkd benchmark run``, is not finished, or its files are damaged.
    """
    to = Path(config.to)
    check_out_folder(to, "--to")
    comparison = compare(read_models(config.outs), resamples=config.resamples, seed=config.seed)
    warnings, differing = warnings_of(comparison), differing_questions(comparison)
    names = [model.name for model in comparison.models]
    title = f"Benchmarks of {names[0]}" if len(names) == 1 else f"Benchmarks of {len(names)} models"
    sections = [
        heading(title),
        *(paragraph(warning, "warning") for warning in warnings),
        scores_section(comparison),
        published_section(comparison),
        pairs_section(comparison),
        categories_section(comparison),
        differing_section(differing),
        settings_section(comparison, warnings),
        method_section(comparison),
    ]
    to.mkdir(parents=True, exist_ok=True)
    write_page(to / "report.html", page(title, sections, STYLE))
    write_page(to / "report.md", markdown_table(comparison))
    figures = figures_of(comparison, differing, warnings)
    return {"report": str(to / "report.html"), "table": str(to / "report.md"), **figures}


def figures_in_words(figures: dict[str, Any]) -> str:
    """What ``alignkd benchmark report`` prints for people."""
    lines = []
    for model in figures["models"]:
        for found in model["benchmarks"].values():
            limited = f", limited to {found['limit']:,} questions" if found["limit"] is not None else ""
            words = f"{score_words(found['score'], found['unit'])} ({interval_words(found['interval_95'])})"
            lines.append(f"{model['name']}: {found['title']} {words}{limited}")
        average = model["average"]
        words = f"none, {average['why_none']}" if average["value"] is None else f"{average['value']:.1f}"
        lines.append(f"{model['name']}: average of the six {words}")
    lines += [f"warning: {warning}" for warning in figures["warnings"]]
    return "\n".join([*lines, f"report: {figures['report']}", f"table: {figures['table']}"])
