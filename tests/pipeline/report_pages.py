"""What the tests of reports share: pages parsed as a browser would, and runs whose files are written by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tiny_runs import IMAGES

from alignkd.losses.recipes import get_recipe, recipe_record

_ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "table", "thead", "tbody", "tr", "td"),
    *("th", "img", "figure", "figcaption", "ul", "li", "i", "b", "details", "summary", "pre"),
    *("br", "span", "strong", "u"),
}
_REFERENCES = ("src", "href", "srcset", "data", "action", "poster", "background")


@dataclass
class Page(HTMLParser):
    """The elements, the text and the tables of a page; asserts that it fetches and runs nothing."""

    path: Path
    words: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._cell: list[str] | None = None
        self.feed(self.path.read_text(encoding="utf-8"))

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _ALLOWED, tag
        found = dict(attrs)
        assert not [name for name in found if name.startswith("on")], found
        for name in _REFERENCES:
            assert (found.get(name) or "data:image/").startswith("data:image/"), found
        if tag == "img":
            self.images.append(found["alt"] or "")
            assert found["alt"], "a picture without a description"
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            assert self._cell is not None
            self.tables[-1][-1].append(" ".join("".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._cell is not None:
            self._cell.append(data)

    def table(self, head: str) -> list[list[str]]:
        """The rows of the only table in whose first line a cell begins so."""
        (found,) = [table for table in self.tables if any(cell.startswith(head) for cell in table[0])]
        return found


def write_run(
    folder: Path,
    lines: list[dict[str, Any]],
    *,
    result: dict[str, Any] | None = None,
    recipe: Any = "align-kd",
    **settings: Any,
) -> Path:
    """A run's folder without a student: what ``distill`` would have written, with other settings."""
    folder.mkdir(parents=True)
    configuration = {
        "student": str(folder / "gone"),
        "data": str(folder / "gone.json"),
        "images": str(IMAGES),
        "cache": str(folder / "gone-cache"),
        "out": str(folder),
        "recipe": recipe if isinstance(recipe, dict) else recipe_record(get_recipe(recipe)),
        "template": "v1",
        "max_length": 2048,
        "steps": 100,
        "samples": 6,
        "resume": False,
        **settings,
    }
    record = {"command": "distill", "arguments": [], "started": "2026-03-01T00:00:00+00:00", "configuration": configuration}
    (folder / "run.json").write_text(json.dumps({**record, "versions": {"alignkd": "0.1.0"}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def log_line(step: int, **others: Any) -> dict[str, Any]:
    """A log line of two terms."""
    terms = {"supervised": 2.0 / step, "attention": 1.0}
    weighted = {"supervised": 2.0 / step, "attention": 0.1}
    total = sum(weighted.values())
    return {
        "step": step,
        "samples": 2 * step,
        "seconds": 1.5 * step,
        "samples_per_second": 4.0,
        "peak_memory_bytes": 5 * 10**8,
        "loss": total,
        **terms,
        **{f"weighted/{name}": value for name, value in weighted.items()},
        **{f"share/{name}": value / total for name, value in weighted.items()},
        **others,
    }
