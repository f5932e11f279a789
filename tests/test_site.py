"""The documentation site: its table of contents names every page; ``make docs`` builds it without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_readme import PAGES

ROOT = Path(__file__).parents[1]
GENERATED = {"reference/commands", "reference/recipes", "reference/names", "reference/api"}
NOTEBOOK = "docs/quick-start.ipynb"


def lines_of(tree: str) -> list[str]:
    """Returns the pages of a table of contents; ``Title <page>`` sets another title."""
    entries = [line for line in tree.splitlines() if line and not line.startswith(":")]
    return [re.sub(r".*<(.*)>", r"\1", entry) for entry in entries]


def test_the_table_of_contents_names_every_page_once():
    trees = re.findall(r"```\{toctree\}\n(.*?)```", (ROOT / "docs/index.md").read_text(), re.DOTALL)
    named = [line for tree in trees for line in lines_of(tree)]
    pages = {os.path.relpath(page, "docs").removesuffix(".md") for page in PAGES if page != "docs/index.md"}
    assert sorted(named) == sorted({*pages, *GENERATED, os.path.relpath(NOTEBOOK, "docs")})


@pytest.mark.slow
@pytest.mark.site
def test_the_site_builds_without_a_warning(tmp_path: Path):
    pytest.importorskip("sphinx")
    build = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "--conf-dir", "docs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "http_proxy": "http://localhost:9", "no_proxy": ""}
    done = subprocess.run(
        [*build, ".", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {page.relative_to(tmp_path).with_suffix("").as_posix() for page in tmp_path.rglob("*.html")}
    assert {page.removesuffix(".md") for page in PAGES} <= pages
    assert {"index", "docs/reference/commands/train", "docs/reference/api/maskgit_pl"} <= pages
    text = "".join(page.read_text() for page in tmp_path.rglob("*.html"))
    assert not re.search(r'<(?:script|link)[^>]*(?:src|href)="https?:', text), "a page loads something from the network"
