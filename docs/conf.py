"""Settings of the documentation site: ``make docs`` builds it, without the network, into ``build/site``.

The source of the site is the repository itself, not only ``docs/``: pages link to ``../README.md`` or ``../results``,
and these links lead to the same place on a code host and in the site. A link to a file that is no page, such as a
recipe, becomes a download, or a link to the repository if ``pyproject.toml`` has an address of the source.
"""

import logging
import re
import sys
import tomllib
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # the package need not be installed, and reference.py stands beside

from reference import write_reference  # noqa: E402  # after the path is set

from maskgit_pl import __version__  # noqa: E402  # after the path is set
from maskgit_pl.contrib.web_export import export_page  # noqa: E402  # the same

SOURCE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {}).get("Source")

project = "maskgit_pl"
author = copyright = "The maskgit_pl authors"  # noqa: A001  # Sphinx's name
version = release = __version__
root_doc = "docs/index"
include_patterns = [
    "*.md", "docs/**.md", "docs/**.ipynb", "data/README.md", "benchmarks/README.md", "paper/README.md", "results/**.md",
    "tests/golden/README.md",
]  # fmt: skip
exclude_patterns = [".*", "build", "dist", "runs", "data/raw", "data/shards", "data/cache", "maskgit_pl"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["deflist"]  # flags of commands
myst_heading_anchors = 4  # the anchors of headings that a code host has
nb_execution_mode = "off"  # the notebook has its outputs; a test runs it
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"maskgit_pl {__version__}"
html_extra_path = ["site"]  # index.html of the site leads to docs/index.html
html_copy_source = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#b3450f",
        "color-brand-content": "#b3450f",
        "font-stack": "system-ui, sans-serif",
    },
    "dark_css_variables": {"color-brand-primary": "#f08a4b", "color-brand-content": "#f08a4b"},
}
smartquotes = False  # two hyphens are those of a flag
highlight_language = "none"  # indented blocks are commands, and what they print
pygments_dark_style = "monokai"


def link_to_source(app: Sphinx, doctree: nodes.document) -> None:
    """Replaces downloads of source files by links to the repository."""
    for node in list(doctree.findall(addnodes.download_reference)):
        page = Path(app.env.docname).parent
        file = (ROOT / page / node["reftarget"]).resolve().relative_to(ROOT)
        node.replace_self(nodes.reference("", "", *node.children, refuri=f"{SOURCE}/blob/main/{file.as_posix()}"))


def keep_bars(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Escapes the bars of formulas such as |x|, which reStructuredText reads as a substitution."""
    lines[:] = [re.sub(r"(``.*?``)|\|", lambda found: found[1] or r"\|", line) for line in lines]


def show_model(app: Sphinx, page: str, template: str, context: dict[str, object], doctree: object) -> None:
    """Adds the script to the page "How it works" that shows the model in place of its picture."""
    if page == "docs/how-it-works":
        context["body"] = (
            f"{context['body']}<script type=module>{(ROOT / 'docs/how-it-works/model.js').read_text()}</script>"
        )


def export_model(app: Sphinx, error: Exception | None) -> None:
    """Writes the page of the model of the package, and of its one-step student if there is one."""
    student = ROOT / "runs/one-step"
    if error is None and app.builder.name == "html":
        logging.getLogger("maskgit_pl").setLevel(logging.WARNING)
        model = Path(app.outdir) / "model"
        export_page("fashion-mnist-demo", model, student=student if student.exists() else None, replace=True)


def setup(app: Sphinx) -> None:
    """Writes the generated pages before Sphinx looks for its sources."""
    write_reference(ROOT / "docs" / "reference")
    app.connect("autodoc-process-docstring", keep_bars)
    app.connect("html-page-context", show_model)
    app.connect("build-finished", export_model)
    if SOURCE is not None:
        app.connect("doctree-read", link_to_source)
