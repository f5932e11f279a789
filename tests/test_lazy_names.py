"""Packages whose public names are imported when they are first used."""

import re
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "maskgit_pl"
LAZY = sorted(
    ".".join(["maskgit_pl", *file.parent.relative_to(PACKAGE).parts])
    for file in PACKAGE.rglob("__init__.py")
    if re.search(r"^__getattr__ = lazy_names\(", file.read_text(), re.MULTILINE)
)


def test_the_packages_are_found():
    assert {"maskgit_pl.decoding", "maskgit_pl.evaluation", "maskgit_pl.pipeline", "maskgit_pl.runs"} < {*LAZY}


@pytest.mark.parametrize("package", LAZY)
def test_every_public_name_is_there(package):
    module = import_module(package)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("package", LAZY)
def test_no_module_has_the_name_of_a_public_thing(package):
    """Importing the module would replace the thing."""
    module = import_module(package)
    modules = {path.stem for path in Path(module.__file__).parent.iterdir()}
    assert modules.isdisjoint(module.__all__)


@pytest.mark.parametrize("package", LAZY)
def test_an_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        import_module(package).nothing  # noqa: B018  # the access is what is tried
