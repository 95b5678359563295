"""A self-contained HTML page: style and figures are inside the file."""

import base64
import io
from collections.abc import Iterable

from alignkd.pipeline.figures.attention import Figure, plt
from alignkd.pipeline.runtime.printable import html_text

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .3rem .9rem .3rem 0; text-align: left;
border-bottom: 1px solid #ddd; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } p.small { color: #666; font-size: .9rem; } tr.chosen { font-weight: 600; }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """The text of a page with these sections."""
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html_text(title)}</title><style>{_STYLE}</style>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def figure_section(title: str, figure: Figure, caption: str) -> str:
    """A section with one figure and its caption."""
    return f"<h2>{html_text(title)}</h2>{embed(figure, title)}<p class='small'>{html_text(caption)}</p>"


def embed(figure: Figure, alt: str) -> str:
    """A figure as an image inside the page; the figure is freed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    return f"<img alt='{html_text(alt)}' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"
