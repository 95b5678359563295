"""Bars of HTML and CSS: their words stay as large on a phone as elsewhere. All begin at zero, or have zero in the middle."""

from collections.abc import Mapping, Sequence

from alignkd.pipeline.report.page import Html, joined, shown

COLOURS = ("#1f4e79", "#c0504d", "#4f8a3c", "#7b5aa6", "#b8860b", "#2a8c8c", "#8c5a3c", "#5a5a5a")
"""Of models, in their order; they begin again after the last."""

STYLE = """
.bars { margin: .6rem 0 1.2rem; } .bar { display: grid; grid-template-columns: 29% 1fr 3.8rem;
gap: .6rem; align-items: center; font-size: .9rem; line-height: 1.35; margin: .15rem 0; }
.bar > :last-child { text-align: right; font-variant-numeric: tabular-nums; }
.track { position: relative; height: .95rem; background: #ececec; } .track i { position: absolute; top: 0; bottom: 0; }
.track b { position: absolute; top: 50%; height: 2px; margin-top: -1px; background: #111; }
.track b::before, .track b::after { content: ""; position: absolute; top: -3px; height: 8px; width: 2px; background: #111; }
.track b::before { left: 0; } .track b::after { right: 0; } .track u { position: absolute; top: -2px; bottom: -2px; width: 3px;
margin-left: -1px; } .zero { left: 50%; width: 1px; background: #555; } .group { margin: .7rem 0 .1rem; font-size: .9rem; }
.two { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 0 2rem; }
.difference { display: grid; grid-template-columns: 6rem 1fr; gap: .7rem; font-size: .9rem; }
.difference p { margin: 0 0 .2rem; }
.difference img { width: 100%; } .difference .said { white-space: pre-wrap; }
.none { background: #ececec; height: 4rem; padding: .3rem; font-size: .75rem; }
.interval { color: #565656; font-size: .85rem; font-weight: 400; }
.swatch { display: inline-block; width: .7rem; height: .7rem; margin-right: .35rem; }
@media (max-width: 30rem) { .scroll td, .scroll th { padding-right: .6rem; font-size: .85rem; min-width: 3.9rem; }
.scroll td.number, .scroll th.number { min-width: 0; } .scroll td:first-child, .scroll th:first-child { min-width: 5.6rem; } }
"""


def colour_of(place: int) -> str:
    """The colour of the model in this place."""
    return COLOURS[place % len(COLOURS)]


def bar(label: str, value: float, words: str, most: float, colour: str, interval: tuple[float, float] | None = None) -> Html:
    """A bar from 0 to ``value`` on a track up to ``most``, with its interval as a line."""
    whisker = ""
    if interval is not None:
        low, high = (_percent(end / most) for end in interval)
        whisker = f"<b style='left:{low:.2f}%;width:{high - low:.2f}%'></b>"
    filled = f"<i style='left:0;width:{_percent(value / most):.2f}%;background:{colour}'></i>"
    return _row(label, f"{filled}{whisker}", words)


def around_zero(label: str, value: float, interval: tuple[float, float] | None, words: str, most: float, colour: str) -> Html:
    """A difference as a mark on a track from ``-most`` to ``most``, with its interval as a line."""
    low, high = (_percent((1 + end / most) / 2) for end in (interval or (value, value)))
    mark = f"<u style='left:{_percent((1 + value / most) / 2):.2f}%;background:{colour}'></u>"
    whisker = f"<b style='left:{low:.2f}%;width:{high - low:.2f}%'></b>" if interval else ""
    return _row(label, f"<i class='zero'></i>{whisker}{mark}", words)


def grouped_bars(groups: Mapping[str, Sequence[Html]]) -> Html:
    """Bars in groups with their titles, in as many columns as the screen is wide for."""
    made = [
        f"<div><div class='group'><strong>{shown(name)}</strong></div>{joined(bars)}</div>" for name, bars in groups.items()
    ]
    return Html(f"<div class='bars two'>{''.join(made)}</div>")


def _row(label: str, inside: str, words: str) -> Html:
    return Html(
        f"<div class='bar'><span>{shown(label)}</span><div class='track'>{inside}</div><span>{shown(words)}</span></div>"
    )


def _percent(share: float) -> float:
    return 100 * min(1.0, max(0.0, share))
