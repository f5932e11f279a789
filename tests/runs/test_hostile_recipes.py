"""Recipes and flags that try to run code; a canary module records any success."""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskgit_pl.files import read_yaml
from maskgit_pl.runs.build import build
from maskgit_pl.runs.layers import Layer, flag_layer
from maskgit_pl.runs.plan import Plan
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.settings import RUNS, _keys
from tests.conftest import tiny_flags

RECIPES = Path(__file__).parents[2] / "recipes"
CANARY = "canary_module"
MODULE = """
import lightning.pytorch as pl
def wake(*a, **k): open({file!r}, "w")
wake()
class Callback(pl.Callback):
    def __init__(self, *a, **k): wake()
"""
EVERY = 97  # one attack of so many is tried
MORE = ["config", "seed_everything", "optimizer", "trainer.callbacks", "trainer.logger", "trainer.plugins"]  # no keys


def payloads(inner: Path) -> Iterator[Any]:
    """Yields values that a parser of classes, nested documents or files would follow to the canary."""
    ours, theirs = f"{CANARY}.Callback", "lightning.pytorch.callbacks.LambdaCallback"
    specs: list[dict[str, Any]] = [{"class_path": name} for name in (ours, theirs, CANARY)]
    specs += [{"class_path": theirs, "init_args": {"on_fit_start": "os._exit"}}]
    specs += [{"name": "cosine", "class_path": ours}, {"name": ours}, {"name": {"class_path": ours}}]
    for spec in specs:
        for nested in (spec, [spec], {"callbacks": spec}, {"strategy": json.dumps(spec)}, {"x": [{"y": spec}]}):
            yield from (nested, json.dumps(nested), json.dumps(json.dumps(nested)), yaml.safe_dump(nested))
    yield from (ours, theirs, CANARY, str(inner), f"@{inner}", {"config": str(inner)}, [str(inner)], f"file://{inner}")
    yield from (f"!!python/name:{CANARY}.wake", f"!!python/object/apply:{CANARY}.wake []", f"__import__('{CANARY}')")
    yield from (f"${{{CANARY}}}", f"{{{{ {CANARY} }}}}", f"${{env:{CANARY}}}", "&a [*a]", "{<<: {class_path: x}}")


@pytest.fixture
def is_awake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Writes the canary module. Returns a function that tells if it was imported or called."""
    canary = tmp_path / "awake"
    (tmp_path / f"{CANARY}.py").write_text(MODULE.format(file=str(canary)))
    (tmp_path / "inner.yaml").write_text(f"callbacks: {{class_path: {CANARY}.Callback}}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, CANARY, raising=False)
    return lambda: canary.exists() or CANARY in sys.modules


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_no_recipe_and_no_flag_runs_code(stage: Any, tmp_path, is_awake, tiny_shards, tiny_pretrained) -> None:
    """Each attack is rejected in one line, or is read as plain data, and never runs code."""
    file, base = tmp_path / "recipe.yaml", Layer("base", read_yaml(RECIPES / stage / "base.yaml"))
    tokenizer = tiny_pretrained / "tokenizer" if stage == "transformer" else None
    attacks = itertools.product([*_keys(RUNS[stage], {}), *MORE], payloads(tmp_path / "inner.yaml"), (False, True))
    answers = set()
    for key, value, is_flag in itertools.islice(attacks, 0, None, EVERY):
        words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}"] if is_flag else []
        file.write_text("{}" if is_flag else yaml.safe_dump(flag_layer(key, json.dumps(value)).tree))
        answer, recipe = "", None
        try:
            recipe = Recipe.from_layers(stage, [base, Layer("recipe", read_yaml(file))], words)
        except ValueError as error:
            answer = str(error)
        assert "\n" not in answer
        assert not is_awake(), (key, value)
        answers.add(recipe is None)
        if recipe is not None:
            tiny = [word for word in tiny_flags(stage) if not key.startswith(word[2:].partition("=")[0])]
            with suppress(ValueError, OSError):
                build(Plan(recipe.with_overrides(tiny), tiny_shards, tmp_path / "run", tokenizer))
            assert not is_awake(), (key, value)
    assert answers == {True, False}
