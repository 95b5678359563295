"""The parts of the page: scores, pairs of models, categories, settings, and how figures were found."""

from collections.abc import Sequence

from alignkd.pipeline.evaluate.benchmarks.registry import SIX
from alignkd.pipeline.evaluate.statistics import Difference
from alignkd.pipeline.report.benchmarks.bars import around_zero, bar, colour_of, grouped_bars
from alignkd.pipeline.report.benchmarks.comparison import Average, Comparison, Pair
from alignkd.pipeline.report.benchmarks.figures import interval_words, p_words, signed_words
from alignkd.pipeline.report.benchmarks.formulas import category_figures
from alignkd.pipeline.report.benchmarks.markdown import comparable_benchmarks
from alignkd.pipeline.report.benchmarks.out_folders import Model
from alignkd.pipeline.report.benchmarks.published import PUBLISHED, why_not_comparable
from alignkd.pipeline.report.benchmarks.warnings import value_words
from alignkd.pipeline.report.page import Html, Text, details, heading, joined, paragraph, section, shown, small, table

_MOST = {"mme": 2000.0}
"""What a benchmark gives at most; 100 otherwise."""
_MOST_OF_A_CATEGORY = {"mme": 200.0}
_MOST_CATEGORIES = 40


def scores_section(comparison: Comparison) -> Html:
    """A table of scores with their intervals, models in columns, and the same as bars."""
    names = [*SIX, *(name for name in comparison.benchmarks if name not in SIX)]
    rows: list[list[Text]] = []
    for name in names:
        title = comparison.title_of(name) if name in comparison.benchmarks else name
        rows.append([_unit(title, name), *(_score_cell(comparison, model, name) for model in comparison.models)])
    rows.append(["average of the six", *(_average_cell(comparison.averages[model.name]) for model in comparison.models)])
    heads: list[Text] = ["", *(_swatched(place, model.name) for place, model in enumerate(comparison.models))]
    groups = {
        f"{comparison.title_of(name)}, 0 to {_MOST.get(name, 100.0):,.0f}": [
            _score_bar(comparison, model, place, name) for place, model in enumerate(comparison.models) if name in model.results
        ]
        for name in comparison.benchmarks
    }
    return section(
        "Scores",
        table(heads, rows, total=True),
        small(
            "Below each score its 95 % interval. The average is that of the papers: (GQA + SQA + TextVQA + POPE + MME"
            " perception / 20 + MMBench) / 6, where all six are there, none is limited, and all follow one protocol."
        ),
        grouped_bars(groups),
    )


def _unit(title: str, name: str) -> str:
    return f"{title}, points of 2,000" if name == "mme" else f"{title}, %"


def _swatched(place: int, name: str) -> Html:
    return Html(f"<span class='swatch' style='background:{colour_of(place)}'></span>{shown(name)}")


def _score_cell(comparison: Comparison, model: Model, name: str) -> Text:
    if name not in model.results:
        return "not run"
    scored, limit = comparison.scores[model.name][name], model.results[name].limit
    limited = f"<br><strong>limited to {limit:,} questions</strong>" if limit is not None else ""
    return Html(f"{scored.value:,.1f}<br><span class='interval'>{interval_words(scored.interval)}</span>{limited}")


def _average_cell(average: Average) -> Text:
    if average.value is None:
        return f"none: {average.reason}"
    return Html(f"{average.value:.1f}<br><span class='interval'>{interval_words(average.interval)}</span>")


def _score_bar(comparison: Comparison, model: Model, place: int, name: str) -> Html:
    scored = comparison.scores[model.name][name]
    return bar(model.name, scored.value, f"{scored.value:,.1f}", _MOST.get(name, 100.0), colour_of(place), scored.interval)


def published_section(comparison: Comparison) -> Html:
    """Published figures where a run may stand beside them; why not, for the others."""
    comparable = comparable_benchmarks(comparison)
    reasons = [
        f"{result.title} of {model.name}: {reason}"
        for model in comparison.models
        for result in model.results.values()
        if result.benchmark in SIX and (reason := why_not_comparable(result))
    ]
    why: list[Text] = []
    if reasons:
        whole = f"Not to be held against published figures: {'; '.join(reasons)}."
        why = [details(f"Not comparable with published figures: {len(reasons):,} results", small(whole))]
    if not comparable:
        none = "No result here is of all official questions under MobileVLM's protocol, so published figures are not shown."
        return section("Published figures", paragraph(none, "missing"), *why)
    rows: list[list[Text]] = [
        [_unit(comparison.title_of(name), name), *(f"{row.scores[name]:,.1f}" for row in PUBLISHED)] for name in comparable
    ]
    if len(comparable) == len(SIX):
        rows.append(["average of the six", *(f"{row.average:.1f}" for row in PUBLISHED)])
    rows.append(["source", *(row.source for row in PUBLISHED)])
    note = (
        "For orientation: as the papers print them, without intervals. How MobileVLM aggregates MMBench and POPE is presumed."
    )
    return section("Published figures", table(["", *(row.name for row in PUBLISHED)], rows), small(note), *why)


def pairs_section(comparison: Comparison) -> Html:
    """Each pair of models: difference, interval and p for each benchmark that both have."""
    if not comparison.pairs:
        return Html("")
    parts = [_pair(comparison, pair) for pair in comparison.pairs]
    words = (
        "On the questions that both were asked and that count. Pictures are drawn again, the same ones for both models"
        f" ({comparison.resamples:,} times, seed {comparison.seed}). p is two-sided, and not corrected for the number of"
        " comparisons. It says nothing of another training run with another seed."
    )
    return section("Models against each other", small(words), *parts)


def _pair(comparison: Comparison, pair: Pair) -> Html:
    heads = ["", "difference", "95 % interval", "p", "questions"]
    rows: list[list[Text]] = [
        [_unit(one.title, one.benchmark), *_difference_cells(one.difference, comparison.resamples), f"{one.counted:,}"]
        for one in pair.compared
    ]
    if pair.average is not None:
        rows.append(["average of the six", *_difference_cells(pair.average, comparison.resamples), ""])
    left_out = [small(f"{title} is not compared: {reason}.") for title, reason in pair.left_out.items()]
    if not rows:
        none = paragraph("They have no benchmark in common that can be compared.", "missing")
        return joined([heading(f"{pair.second} less {pair.first}", 3), none, *left_out])
    made = table(heads, rows, numbers=(1, 2, 3, 4), total=pair.average is not None)
    return joined([heading(f"{pair.second} less {pair.first}", 3), made, _axis(comparison, pair), *left_out])


def _difference_cells(difference: Difference, resamples: int) -> list[Text]:
    interval = difference.interval
    words = "none" if interval is None else f"{signed_words(interval[0])} to {signed_words(interval[1])}"
    return [signed_words(difference.value), words, p_words(difference.p, resamples)]


def _axis(comparison: Comparison, pair: Pair) -> Html:
    """All differences on one axis; points of MME are divided by 20, as in the average."""
    colour = colour_of([model.name for model in comparison.models].index(pair.second))
    found = [
        (f"{one.title}{' / 20' if one.benchmark == 'mme' else ''}", one.difference, 20 if one.benchmark == "mme" else 1)
        for one in pair.compared
    ]
    if pair.average is not None:
        found.append(("average", pair.average, 1))
    ends = [abs(end) / by for _, one, by in found for end in (*(one.interval or ()), one.value)]
    most = max([1.0, *ends]) * 1.05
    bars = [
        around_zero(
            label,
            one.value / by,
            None if one.interval is None else (one.interval[0] / by, one.interval[1] / by),
            signed_words(one.value / by),
            most,
            colour,
        )
        for label, one, by in found
    ]
    note = f"The axis goes from {-most:.1f} to {most:.1f}, with zero in the middle; the line is the 95 % interval."
    return Html(f"<div class='bars'>{joined(bars)}{small(note)}</div>")


def categories_section(comparison: Comparison) -> Html:
    """Each benchmark's figure by category, as bars."""
    parts: list[Text] = []
    for name in comparison.benchmarks:
        figures = {model.name: category_figures(model.results[name]) for model in comparison.models if name in model.results}
        categories = list(dict.fromkeys(category for found in figures.values() for category in found))
        if not categories:
            continue
        shown_ones, most = categories[:_MOST_CATEGORIES], _MOST_OF_A_CATEGORY.get(name, 100.0)
        groups = {
            category: [
                bar(model.name, figures[model.name][category], f"{figures[model.name][category]:,.1f}", most, colour_of(place))
                for place, model in enumerate(comparison.models)
                if category in figures.get(model.name, {})
            ]
            for category in shown_ones
        }
        left = f" {len(categories) - len(shown_ones):,} more categories are not shown." if len(categories) > len(groups) else ""
        words = small(f"{_CATEGORY_WORDS.get(name, 'In per cent')}; bars go from 0 to {most:,.0f}.{left}")
        parts.append(
            details(comparison.title_of(name), words, grouped_bars(groups), is_open=name in ("mme", "mmbench", "pope"))
        )
    return section("By category", *parts) if parts else Html("")


_CATEGORY_WORDS = {
    "mme": "Right questions in % and pictures with both right in %, added",
    "mmbench": "Questions with every pass right, %",
    "pope": "F1, %",
}


def settings_section(comparison: Comparison, warnings: Sequence[str]) -> Html:
    """Protocol, notes and settings of every result, in a table for each benchmark."""
    parts: list[Text] = [
        small("Everything that decides a score. Where models differ, a warning stands at the top of the page.")
    ]
    for name in comparison.benchmarks:
        found = [model for model in comparison.models if name in model.results]
        results = [model.results[name] for model in found]
        names = dict.fromkeys(key for result in results for key in result.settings)
        rows: list[list[Text]] = [["protocol", *(result.protocol for result in results)]]
        rows.append(["questions", *(f"{len(result.lines):,}" for result in results)])
        rows += [[key.replace("_", " "), *(value_words(result.settings.get(key)) for result in results)] for key in names]
        rows.append(["interval", *(comparison.scores[model.name][name].method for model in found)])
        rows.append(["notes", *("; ".join(result.notes) or "none" for result in results)])
        rows.append(["data", *(result.folder for result in results)])
        title = comparison.title_of(name)
        differ = any(title in words.split(":")[0].split(", ") for words in warnings)
        parts.append(details(f"{title}{', with warnings' if differ else ''}", table(["", *(m.name for m in found)], rows)))
    places = [[model.name, model.out.as_posix(), next(iter(model.results.values())).model] for model in comparison.models]
    return section("Settings", *parts, table(["model", "results", "folder of the model"], places))


def method_section(comparison: Comparison) -> Html:
    """How intervals and p were found."""
    words = (
        "Questions about one picture are not independent. So an interval is Wilson's only where every picture has one question"
        " that is right or wrong; elsewhere pictures are drawn with replacement (within the categories of MME), the benchmark's"
        f" own formula is computed on each of {comparison.resamples:,} draws, and the middle 95 % is shown. A difference is"
        " resampled in the same way, both models on the same draws: p = 2 (min(#&le;0, #&ge;0) + 1) / (draws + 1), at most 1."
        " Intervals are of the questions: they do not cover what another seed of training would give."
    )
    return section("How the figures were found", small(Html(words)))
