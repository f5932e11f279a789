"""The public functions, called from Python: what they give, and what importing them costs."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from maskgit_pl import evaluation


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, maskgit_pl.evaluation\n"
        "print([name for name in ('torch', 'lightning', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", evaluation.__all__)
def test_every_public_name_exists_and_differs_from_all_modules(name: str) -> None:
    assert getattr(evaluation, name) is not None
    folder = Path(evaluation.__file__).parent
    assert not (folder / f"{name}.py").exists()
    assert not (folder / name).exists()


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'evaluat'"):
        evaluation.evaluat  # noqa: B018  # its access is what is tested
    assert import_module("maskgit_pl.evaluation.ledger").Ledger is evaluation.Ledger
