"""Generated recipes and flags that try to run code; a canary module records any success."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskgit_pl.files import read_yaml
from maskgit_pl.runs.build import build
from maskgit_pl.runs.layers import Layer
from maskgit_pl.runs.plan import Plan
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.settings import RUNS, _keys
from tests.conftest import tiny_flags

RECIPES = Path(__file__).parents[2] / "recipes"
CANARY = "canary_module"
EVERY = 97  # one attack of so many is tried
MORE = ["config", "seed_everything", "optimizer", "trainer.callbacks", "trainer.logger", "trainer.plugins"]  # no keys


@dataclass(frozen=True)
class Attack:
    """An attack by a recipe or by a flag.

    Attributes:
        key: Dotted key of the value.
        value: Hostile value.
        as_flag: True for a flag ``--key=value``, False for a recipe file.
    """

    key: str
    value: Any
    as_flag: bool

    def words(self) -> list[str]:
        text = self.value if isinstance(self.value, str) else json.dumps(self.value)
        return [f"--{self.key}={text}"] if self.as_flag else []

    def tree(self) -> dict[str, Any]:
        if self.as_flag:
            return {}
        tree: Any = self.value
        for part in reversed(self.key.split(".")):
            tree = {part: tree}
        return tree


def payloads(inner: Path) -> Iterator[Any]:
    """Yields values that a parser of classes, nested documents or files would follow to the canary."""
    classes = [f"{CANARY}.Callback", "lightning.pytorch.callbacks.LambdaCallback", f"{CANARY}"]
    specs: list[dict[str, Any]] = [{"class_path": name} for name in classes]
    specs += [{"class_path": classes[1], "init_args": {"on_fit_start": "os._exit"}}]
    specs += [{"name": "cosine", "class_path": classes[0]}, {"name": classes[0]}, {"name": {"class_path": classes[0]}}]
    for spec in specs:
        nested = [spec, [spec], {"callbacks": spec}, {"strategy": json.dumps(spec)}, {"x": [{"y": spec}]}]
        for each in nested:
            yield each
            yield json.dumps(each)
            yield json.dumps(json.dumps(each))
            yield yaml.safe_dump(each)
    yield from classes
    yield from (str(inner), f"@{inner}", {"config": str(inner)}, [str(inner)], f"file://{inner}")
    yield from (f"!!python/name:{CANARY}.wake", f"!!python/object/apply:{CANARY}.wake []", f"__import__('{CANARY}')")
    yield from (f"${{{CANARY}}}", f"{{{{ {CANARY} }}}}", f"${{env:{CANARY}}}", "&a [*a]", "{<<: {class_path: x}}")


def attacks(stage: str, inner: Path) -> Iterator[Attack]:
    """Yields each payload at each key, in a file and as a flag."""
    for key, value, as_flag in itertools.product([*_keys(RUNS[stage], {}), *MORE], payloads(inner), (False, True)):
        yield Attack(key, value, as_flag)


@pytest.fixture
def awake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Writes the canary module. Returns a function that tells if it was imported or called."""
    canary = tmp_path / "awake"
    (tmp_path / f"{CANARY}.py").write_text(
        f"import pathlib\nimport lightning.pytorch as pl\ndef wake(*a, **k): pathlib.Path({str(canary)!r}).touch()\n"
        "wake()\nclass Callback(pl.Callback):\n    def __init__(self, *a, **k): wake()\n"
    )
    spec = f"class_path: {CANARY}.Callback"
    (tmp_path / "inner.yaml").write_text(f"callbacks: {{{spec}}}\n{spec}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, CANARY, raising=False)
    return lambda: canary.exists() or CANARY in sys.modules


def refused_or_read(stage: Any, base: Layer, file: Path, words: list[str]) -> Recipe | None:
    try:
        return Recipe.from_layers(stage, [base, Layer("recipe", read_yaml(file))], words)
    except ValueError as error:
        if len(str(error).splitlines()) != 1:
            raise AssertionError(f"an answer of one line is wanted, got {error}") from error
    return None


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_no_recipe_and_no_flag_runs_code(
    stage: Any, tmp_path: Path, awake: Callable[[], bool], tiny_shards: Path, tiny_pretrained: Path
) -> None:
    """Checks that each attack is rejected in one line, or is read as plain data, and never runs code."""
    tried = taken = 0
    file = tmp_path / "recipe.yaml"
    base = Layer("base", read_yaml(RECIPES / stage / "base.yaml"))
    tokenizer = tiny_pretrained / "tokenizer" if stage == "transformer" else None
    for attack in itertools.islice(attacks(stage, tmp_path / "inner.yaml"), 0, None, EVERY):
        tried += 1
        file.write_text(yaml.safe_dump(attack.tree()))
        recipe = refused_or_read(stage, base, file, attack.words())
        assert not awake(), attack
        if recipe is None:
            continue
        taken += 1
        tiny = [word for word in tiny_flags(stage) if not attack.key.startswith(word[2:].partition("=")[0])]
        with suppress(ValueError, OSError):
            build(Plan(recipe.with_overrides(tiny), tiny_shards, tmp_path / "run", tokenizer))
        assert not awake(), attack
    assert tried > taken > 0
