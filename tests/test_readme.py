"""README and the other pages: links lead somewhere, and Python blocks are valid. ``test_page_code.py`` runs them."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from maskgit_pl import __version__
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pipeline.pretrained import fingerprint, save_tokenizer, save_transformer
from maskgit_pl.runs.recipe import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GENERATED = ROOT / "docs/reference"  # by `make docs`
PAGES = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "RELEASING.md",
    "data/README.md", "benchmarks/README.md", "tests/golden/README.md",
    *sorted(
        page.relative_to(ROOT).as_posix()
        for each in ("docs", "results")
        for page in (ROOT / each).rglob("*.md")
        if not page.is_relative_to(GENERATED)
    ),
]  # fmt: skip
RUN_IN_ORDER = ("README.md", "docs/generation.md")  # pages whose examples use the demo's run, and what came before
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
MAX_LINES, MAX_WIDTH = 150, 140


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


BLOCKS = [block for page in RUN_IN_ORDER for block in python_blocks(page) if "pipe" in block]


def save_small_model(folder: Path) -> None:
    """Saves a model of the default data (28 px, 7 x 7 tokens, its ten classes) with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vqgan = VQGANConfig(
            1,
            base_channels=8,
            channel_multipliers=(1, 1, 1),
            num_res_blocks=1,
            num_groups=2,
            codebook_size=16,
            code_dim=4,
        )
        tokenizer = VQGAN(vqgan)
        config = TransformerConfig(16, 10, (7, 7), 16, 1, 2, 32)
        transformer = MaskedTransformer(config)
    save_tokenizer(folder / "tokenizer", vqgan, tokenizer.state_dict(), image_size=28)
    save_transformer(
        folder / "transformer",
        config,
        transformer.state_dict(),
        mask_schedule="cosine",
        decoding=DecodingConfig(),
        class_names=CLASSES,
        tokenizer_fingerprint=fingerprint(folder / "tokenizer"),
    )


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= MAX_LINES
    assert [line for line in lines if len(line) > MAX_WIDTH] == []


def test_the_first_example_takes_three_lines():
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) == 3
    assert ".generate(" in lines[-1]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_the_examples_name_the_demos_run(block: str):
    for path in re.findall(r'"(runs/[^"]+)"', block):
        assert path == "runs/fashion-mnist-adaln"


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_the_python_of_a_page_is_valid(page: str):
    for block in python_blocks(page):
        compile(block, page, "exec")


IMPORTS = sorted(
    {
        line
        for page in PAGES
        for line in re.findall(r"^ *(from maskgit_pl\S* import .*)$", (ROOT / page).read_text(), re.M)
    }
)


@pytest.mark.parametrize("line", IMPORTS)
def test_a_name_that_a_page_imports_is_there(line: str):
    if "diffusers_pipeline" in line:
        pytest.importorskip("diffusers")
    exec(line, {})


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def tables(text: str) -> list[list[dict[str, str]]]:
    """Returns the Markdown tables of a text: each row as column name -> cell."""
    found = []
    for lines in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines.splitlines()]
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def test_the_results_are_those_of_the_page():
    (shown,) = tables(section("Results"))
    page = (ROOT / "results/fashion-mnist/table-1.md").read_text().replace(" ms an ", " ms per ")
    measured = tables(page)[0]
    assert len(shown) == len(measured) == 3
    for row, whole in zip(shown, measured, strict=True):
        assert row.items() <= whole.items(), "print it again with the command above it"


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


def test_what_people_cite_is_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert f"version = {{{__version__}}}" in README
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
