"""A self-contained HTML page: style and pictures are inside the file, nothing is fetched and nothing runs.

Text is escaped where it enters: what is no :class:`Html` is text from others (:func:`shown`).
"""

import base64
import io
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from alignkd.pipeline.figures.attention import Figure, plt
from alignkd.pipeline.runtime.printable import html_text
from alignkd.pipeline.runtime.redact import redacted_text

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load: what the file holds. A text that was not escaped could not fetch or run anything."""

_STYLE = """
:root { color-scheme: light; } * { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1.2rem 1rem 4rem; color: #1b1b1b;
background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; } td, th { padding: .3rem 1rem .3rem 0; text-align: left; vertical-align: top;
border-bottom: 1px solid #d4d4d4; min-width: 7rem; max-width: 26rem; }
td:first-child, th:first-child { min-width: 8.5rem; } td.number, th.number { text-align: right;
font-variant-numeric: tabular-nums; white-space: nowrap; min-width: 0; }
tr.chosen td, tr.total td { font-weight: 600; } tr.total td { border-top: 2px solid #6b6b6b; }
img { max-width: 100%; height: auto; vertical-align: top; } p.small, figcaption, .legend { color: #565656; font-size: .9rem; }
figure { margin: 0; } .panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr));
gap: 1rem; margin: .8rem 0; }
.tiles { display: grid; gap: .7rem; margin: .5rem 0 1.2rem;
grid-template-columns: repeat(auto-fill, minmax(6.4rem, 10rem)); } .tiles img { width: 100%; }
.legend { list-style: none; padding: 0; margin: .6rem 0; display: flex; flex-wrap: wrap;
gap: .2rem 1.2rem; } .legend i { display: inline-block; width: 1.8rem; vertical-align: .25rem; margin-right: .4rem;
border-top: 3px solid; }
.card { border: 1px solid #d4d4d4; border-radius: 4px; padding: .7rem; } .card p { margin: .3rem 0; white-space: pre-line; }
.card img { max-height: 14rem; } .warning { border-left: 4px solid #a15c00; background: #fff7e8; padding: .5rem .8rem;
margin: .5rem 0; }
.missing { border-left: 4px solid #8a8a8a; background: #f4f4f4; padding: .5rem .8rem; margin: .5rem 0; }
pre { background: #f4f4f4; padding: .7rem; overflow-x: auto; white-space: pre-wrap; font-size: .85rem; }
summary { cursor: pointer; margin: .6rem 0; } code { font-size: .9em; }
"""


class Html(str):
    """Text that is HTML already; any other text is escaped when it is put into a page."""

    __slots__ = ()


Text = str | Html


def shown(text: object) -> Html:
    """A text as HTML: without credentials, hidden characters escaped; HTML stays as it is."""
    return text if isinstance(text, Html) else Html(html_text(redacted_text(str(text))))


def joined(parts: Iterable[Text]) -> Html:
    """Parts one after the other."""
    return Html("".join(shown(part) for part in parts))


def page(title: str, sections: Iterable[str], style: str = "") -> str:
    """The text of a page with these sections, which are HTML. ``style``: rules of CSS beside those of all pages."""
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{shown(title)}</title><style>{_STYLE}{style}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def write_page(path: Path, text: str) -> None:
    """Write a page; a kill leaves the file of before, or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
    part.replace(path)


def heading(title: Text, level: int = 1) -> Html:
    """A heading of the page, or below one of a section."""
    return Html(f"<h{level}>{shown(title)}</h{level}>")


def section(title: Text, *parts: Text) -> Html:
    """A section with its heading."""
    return joined([heading(title, 2), *parts])


def paragraph(text: Text, kind: str = "") -> Html:
    """A paragraph; ``kind``: ``small``, ``warning`` or ``missing``."""
    return Html(f"<p class='{kind}'>{shown(text)}</p>" if kind else f"<p>{shown(text)}</p>")


def small(text: Text) -> Html:
    """A remark, such as a caption."""
    return paragraph(text, "small")


def missing(text: Text) -> Html:
    """What a page cannot show, and why."""
    return paragraph(text, "missing")


def table(
    heads: Sequence[Text],
    rows: Iterable[Sequence[Text]],
    *,
    numbers: Iterable[int] = (),
    total: bool = False,
    chosen: Iterable[int] = (),
) -> Html:
    """A table that scrolls by itself where it is wider than the screen.

    ``heads``: titles of the columns, none for a table without. ``numbers``: columns that are aligned to the right. ``total``:
    the last row is the sum of the others. ``chosen``: rows that stand out.
    """
    aligned, rows, bold = set(numbers), [list(row) for row in rows], set(chosen)

    def line(cells: Sequence[Text], tag: str, kind: str = "") -> str:
        made = [
            f"<{tag} class='number'>{shown(cell)}</{tag}>" if column in aligned else f"<{tag}>{shown(cell)}</{tag}>"
            for column, cell in enumerate(cells)
        ]
        return f"<tr class='{kind}'>{''.join(made)}</tr>" if kind else f"<tr>{''.join(made)}</tr>"

    kinds = ["chosen" if number in bold else "" for number in range(len(rows))]
    if total and rows:
        kinds[-1] = "total"
    head = f"<thead>{line(heads, 'th')}</thead>" if heads else ""
    body = "".join(line(row, "td", kind) for row, kind in zip(rows, kinds, strict=True))
    return Html(f"<div class='scroll'><table>{head}<tbody>{body}</tbody></table></div>")


def details(summary: Text, *parts: Text, is_open: bool = False) -> Html:
    """Parts that a reader opens."""
    return Html(f"<details{' open' if is_open else ''}><summary>{shown(summary)}</summary>{joined(parts)}</details>")


def preformatted(text: Text) -> Html:
    """Text in the letters of a terminal, such as a command."""
    return Html(f"<pre>{shown(text)}</pre>")


def panels(parts: Iterable[Text], kind: str = "panels") -> Html:
    """Parts side by side, as many as the screen is wide for. ``kind``: ``tiles`` are smaller than ``panels``."""
    return Html(f"<div class='{kind}'>" + "".join(f"<div>{shown(part)}</div>" for part in parts) + "</div>")


def captioned(picture: Html, caption: Text) -> Html:
    """A picture with its caption."""
    return Html(f"<figure>{picture}<figcaption>{shown(caption)}</figcaption></figure>")


def card(*parts: Text) -> Html:
    """Parts with a border around them."""
    return Html(f"<div class='card'>{joined(parts)}</div>")


def figure_section(title: Text, figure: Figure, caption: Text) -> Html:
    """A section with one figure and its caption."""
    return section(title, embed(figure, str(title)), small(caption))


def embed(figure: Figure, alt: str) -> Html:
    """A figure as a picture inside the page; the figure is freed. Screens of twice the usual density show it sharp."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # such a character is drawn as a box
        figure.savefig(buffer, format="png", dpi=144, bbox_inches="tight")
    plt.close(figure)
    return _data_image("png", buffer.getvalue(), alt, scale=1.5)


def thumbnail(picture: Image.Image, alt: str, *, most: int = 448) -> Html:
    """A picture inside the page, at most so many pixels wide and high."""
    buffer = io.BytesIO()
    copy = picture.convert("RGB")
    copy.thumbnail((most, most))
    copy.save(buffer, format="jpeg", quality=88)
    return _data_image("jpeg", buffer.getvalue(), alt)


def _data_image(kind: str, content: bytes, alt: str, scale: float = 1.0) -> Html:
    """``scale``: pixels of the picture for each of the page."""
    with Image.open(io.BytesIO(content)) as picture:
        width = round(picture.width / scale)
    data = base64.b64encode(content).decode()
    return Html(f"<img alt='{shown(alt)}' width='{width}' src='data:image/{kind};base64,{data}'>")
