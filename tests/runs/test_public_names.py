"""The public names of ``maskgit_pl.runs``, and the cost of their import."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from maskgit_pl import runs


@pytest.mark.parametrize("name", runs.__all__)
def test_a_name_is_there_and_is_documented(name):
    assert getattr(runs, name).__doc__
    assert getattr(runs, name).__name__ == name


def test_the_documentation_calls_what_there_is(monkeypatch):
    calls, signature = [], inspect.signature(runs.fit)
    monkeypatch.setattr(runs, "fit", lambda *args, **named: calls.append(signature.bind(*args, **named)), raising=False)
    page = (Path(runs.__file__).parents[2] / "docs" / "python.md").read_text()
    (block,) = re.findall(r"^```python\n(from maskgit_pl import runs\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(block, {})
    assert calls[0].args[0].get("trainer.max_steps") == 100_000


def test_a_recipe_is_read_and_a_wrong_call_is_refused_without_torch():
    code = """
import sys
from maskgit_pl import runs
recipe = runs.Recipe.read("tokenizer", overrides={"data.seed": 3})
try:
    runs.fit(recipe, data="nowhere")
except FileNotFoundError:
    sys.exit(90 if {"torch", "lightning"} & set(sys.modules) else 0)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
