"""Settings of Sphinx: the pages of this folder, and API pages generated from docstrings when the site is built.

``make docs`` builds into ``build/docs``. What is generated (``docs/api``, ``build``) is not committed.
"""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import alignkd

project = "alignkd"
author = "the alignkd authors"
version = release = alignkd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.apidoc", "sphinx.ext.napoleon"]
exclude_patterns = ["api/modules.rst"]
html_theme = "furo"
html_title = f"alignkd {release}"

# So that [text](page.md#a-heading) finds the heading.
myst_heading_anchors = 3
# Fields called `bytes` or `object` make every mention of the types of that name ambiguous.
suppress_warnings = ["ref.python"]

# One page a room, written to docs/api. The links inside alignkd/ are followed.
apidoc_modules = [
    {
        "path": Path(__file__).parents[1] / "alignkd",
        "destination": "api",
        "follow_links": True,
        "max_depth": 1,
        "module_first": True,
        # The import of the first needs Triton; the package of the second exports its class, which would be described twice.
        "exclude_patterns": ["**/triton_kernel.py", "**/losses/recipes/recipe.py"],
    }
]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False


def escape_bars(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:  # noqa: ARG001
    """Show ``|x|`` in a docstring as an absolute value; reStructuredText would look for a substitution."""
    for i, line in enumerate(lines):
        parts = re.split(r"(``.*?``)", line)
        lines[i] = "".join(part if part.startswith("``") else part.replace("|", r"\|") for part in parts)


def skip_foreign(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:  # noqa: ARG001
    """Leave out classes and functions of other packages that a module exports."""
    module = getattr(obj, "__module__", None)
    return True if what == "module" and isinstance(module, str) and not module.startswith("alignkd") else None


def link_pages(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:  # noqa: ARG001
    """Where a page includes README.md and others from the top, their links to each other become links to pages."""
    for name in ("README", "CONTRIBUTING", "CHANGELOG"):
        content[0] = content[0].replace(f"]({name}.md", f"](docs/{name.lower()}.md")
    content[0] = content[0].replace("[examples/](examples)", "`examples/`")


def setup(app: Sphinx) -> None:
    """Connect the functions above to Sphinx."""
    app.connect("include-read", link_pages)
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("autodoc-skip-member", skip_foreign)
