"""The scores as one table of Markdown."""

import html
import re
from collections.abc import Sequence

from alignkd.pipeline.evaluate.benchmarks.registry import SIX
from alignkd.pipeline.report.benchmarks.comparison import Comparison
from alignkd.pipeline.report.benchmarks.figures import interval_words
from alignkd.pipeline.report.benchmarks.out_folders import Model
from alignkd.pipeline.report.benchmarks.published import PUBLISHED, why_not_comparable
from alignkd.pipeline.runtime.printable import printable
from alignkd.pipeline.runtime.redact import redacted_text


def markdown_table(comparison: Comparison) -> str:
    """One row for each model, and below them the published ones where a full run under MobileVLM's protocol is shown."""
    names = [*SIX, *(name for name in comparison.benchmarks if name not in SIX)]
    titles = [comparison.title_of(name) if name in comparison.benchmarks else name for name in names]
    rows = [_line(["model", *titles, "average of six", "protocol"]), _line(["---", *["---:"] * (len(names) + 1), "---"])]
    rows += [_line(_cells(comparison, model, names)) for model in comparison.models]
    for row in PUBLISHED if (comparable := comparable_benchmarks(comparison)) else ():
        scores = [f"{row.scores[name]:,.1f}" if name in comparable else "" for name in names]
        average = f"{row.average:.1f}" if len(comparable) == len(SIX) else ""
        rows.append(_line([f"{row.name}, published: {row.source}", *scores, average, "the paper's"]))
    return "\n".join(rows) + "\n"


def comparable_benchmarks(comparison: Comparison) -> list[str]:
    """Those of the six in which at least one model may stand beside the published ones."""
    return [
        name
        for name in SIX
        if any(name in model.results and not why_not_comparable(model.results[name]) for model in comparison.models)
    ]


def _cells(comparison: Comparison, model: Model, names: Sequence[str]) -> list[str]:
    scores, average = comparison.scores[model.name], comparison.averages[model.name]
    cells = [model.name]
    for name in names:
        if name not in scores:
            cells.append("not run")
            continue
        limit = model.results[name].limit
        words = f"{scores[name].value:,.1f} ({interval_words(scores[name].interval)})"
        cells.append(words if limit is None else f"{words}, limited to {limit:,} questions")
    words = average.reason if average.value is None else f"{average.value:.1f} ({interval_words(average.interval)})"
    return [*cells, words, ", ".join(sorted({result.protocol for result in model.results.values()}))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    """A text on one line in which Markdown and HTML mean nothing."""
    safe = html.escape(printable(redacted_text(text)), quote=False)
    return safe if set(text) <= {"-", ":"} else re.sub(r"([\\`*_\[\]|~])", r"\\\1", safe)
