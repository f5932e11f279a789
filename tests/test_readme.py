"""README and the other pages: links lead somewhere, Python blocks are valid, and the site has every page.

``test_page_code.py`` runs the blocks.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from maskgit_pl import __version__
from maskgit_pl.runs.recipe import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GENERATED = ROOT / "docs/reference"  # by `make docs`
PAGES = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "RELEASING.md",
    "data/README.md", "benchmarks/README.md", "paper/README.md", "tests/golden/README.md",
    *sorted(
        page.relative_to(ROOT).as_posix()
        for each in ("docs", "results")
        for page in (ROOT / each).rglob("*.md")
        if not page.is_relative_to(GENERATED)
    ),
]  # fmt: skip
RUN_IN_ORDER = ("README.md", "docs/generation.md")  # pages whose examples use the demo's run, and what came before


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def save_small_model(folder: Path) -> None:
    """Puts the model of the package in the place of a run's: 28 px, 7 x 7 tokens, ten classes."""
    folder.parent.mkdir(parents=True)
    folder.symlink_to(ROOT / "maskgit_pl/models/fashion-mnist-demo")


def test_the_python_of_all_pages_is_valid_and_every_name_that_it_imports_is_there():
    for page in PAGES:
        for block in python_blocks(page):
            compile(block, page, "exec")
        for line in re.findall(r"^ *(from maskgit_pl\S* import .*)$", (ROOT / page).read_text(), re.MULTILINE):
            exec(line, {})


def tables(text: str) -> list[list[dict[str, str]]]:
    """Returns the Markdown tables of a text: each row as column name -> cell."""
    rows_of_tables = []
    for lines in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines.splitlines()]
        rows_of_tables.append([dict(zip(head, row, strict=True)) for row in rows])
    return rows_of_tables


def test_the_results_are_those_of_the_page():
    (shown,) = tables(README.split("\n## Results\n")[1].split("\n## ")[0])
    measured, _, _, times, scores, *_ = tables((ROOT / "results/fashion-mnist/table-1.md").read_text())
    assert len(shown) == len(measured) == len(scores) == 5
    for row, whole, score in zip(shown, measured, scores, strict=True):
        timed = next((line for line in times if line["model"] == row["model"]), {})
        page = {**whole, **timed, "CAS top-1 %": score["top-1 %"]}
        assert score["trained on images of"] == row["model"]
        assert {name: cell for name, cell in row.items() if cell}.items() <= page.items()


def slugs(text: str) -> set[str]:
    """Returns the anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page: str):
    file = ROOT / page
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", file.read_text()):
        linked = file.parent / target if target else file
        assert linked.is_file(), f"{target} must be a file: the site has no page of a folder"
        assert not anchor or anchor in slugs(linked.read_text()), f"{target}#{anchor}"


def test_the_map_of_the_documentation_names_every_page():
    text = (ROOT / "docs/README.md").read_text()
    named = {(ROOT / "docs" / target).resolve() for target in re.findall(r"\]\(([^)#:]+)", text)}
    pages = {ROOT / page for page in PAGES if page.startswith("docs/")}
    assert pages - named == {ROOT / "docs/README.md", ROOT / "docs/index.md"}


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """Returns the values of a tree by their dotted keys."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def test_the_recipes_for_own_images_are_valid():
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/own-images.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for values in map(flatten, map(yaml.safe_load, blocks)):
        recipe = Recipe.read("tokenizer", dataset="mine", overrides=values)
        assert {key: recipe.get(key) for key in values} == values


def test_the_citation_has_the_version_of_the_package():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert f"version = {{{__version__}}}" in README
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


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
