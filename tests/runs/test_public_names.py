"""The public names of ``maskgit_pl.runs``, and the cost of their import."""

import inspect
import re
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
