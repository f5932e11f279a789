"""Stands in for jsonargparse and LightningCLI, which version 0.1.0 needs and today's environment does not have.

``install`` puts a ``LightningCLI`` in place that merges recipes and flags, fills in defaults from the signatures, and
builds module, data and Trainer. Only ``make.py`` uses it; what is trained and written is the code of version 0.1.0.
"""

import dataclasses
import inspect
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer


class _Config(dict):
    def as_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(self))


class _Parser:
    def __init__(self) -> None:
        self.links: list[tuple[str, str]] = []
        self.top: dict[str, Any] = {"seed_everything": False}

    def add_argument(self, name: str, *, default: Any, **_: Any) -> None:
        self.top[name.removeprefix("--")] = default

    def link_arguments(self, source: str, target: str) -> None:
        self.links.append((source, target))

    def save(self, config: _Config, path: Path, **_: Any) -> None:
        plain = config.as_dict()
        for _, target in self.links:
            *groups, leaf = target.split(".")
            node = plain
            for group in groups:
                node = node[group]
            node.pop(leaf, None)
        path.write_text(yaml.safe_dump(plain, sort_keys=False))


class LightningCLI:
    def __init__(self, model: type, data: type, *, args: list[str], **_: Any) -> None:
        self.parser = _Parser()
        self.add_arguments_to_parser(self.parser)
        tree: dict[str, Any] = {
            **self.parser.top,
            "model": _defaults(model), "data": _defaults(data), "trainer": _defaults(Trainer),
        }  # fmt: skip
        words = list(args)
        while words:
            word = words.pop(0)
            if word == "--config":
                layer = words.pop(0)
                _lay_over(tree, yaml.safe_load(layer if layer.startswith("{") else Path(layer).read_text()))
            else:
                key, value = word.removeprefix("--").split("=", 1)
                _set(tree, key, yaml.safe_load(value))
        for source, target in self.parser.links:
            group, leaf = source.split(".")
            _set(tree, target, tree[group][leaf])
        _lay_over(tree, {"model": _filled(model, tree["model"])})
        self.config = self.config_init = _Config(tree)
        self.before_instantiate_classes()
        self.datamodule = _built(data, tree["data"])
        self.model = _built(model, tree["model"])
        self.trainer = self.instantiate_trainer()

    def _get(self, config: Any, key: str, default: Any) -> Any:
        return dict(config[key])

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        return Trainer(**{**config, "callbacks": callbacks})


def _parameters(kind: type) -> dict[str, tuple[Any, Any]]:
    """Returns type and default of each argument, those that ``**shared`` passes on included."""
    found: dict[str, tuple[Any, Any]] = {}
    for each in kind.__mro__:
        if "__init__" not in vars(each):
            continue
        function = each.__init__
        hints = typing.get_type_hints(function)
        for name, parameter in inspect.signature(function).parameters.items():
            if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(name, (hints.get(name), parameter.default))
        if all(p.kind != p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
            break
    found.pop("transformer", None)  # made by the class that passes the others on
    return found


def _dataclass_in(hint: Any) -> Any:
    return next((each for each in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(each)), None)


def _defaults(kind: type) -> dict[str, Any]:
    return {name: _plain(default) for name, (_, default) in _parameters(kind).items() if default is not inspect._empty}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value)) if isinstance(value, dict | list | tuple) else value


def _filled(kind: type, tree: dict[str, Any]) -> dict[str, Any]:
    filled = {}
    for name, (hint, default) in _parameters(kind).items():
        value = tree.get(name, default)
        inner = _dataclass_in(hint)
        if isinstance(value, dict) and inner is not None:
            value = _filled(inner, value)
        if inner is not None and str(default) == "<factory>" and name not in tree:
            value = _filled(inner, {})
        if value is not inspect._empty:
            filled[name] = _plain(value)
    return filled


def _built(kind: type, tree: dict[str, Any]) -> Any:
    arguments = {}
    for name, (hint, _) in _parameters(kind).items():
        if name in tree:
            inner = _dataclass_in(hint)
            value = tree[name]
            value = tuple(value) if isinstance(value, list) and "tuple" in str(hint) else value
            arguments[name] = _built(inner, value) if isinstance(value, dict) and inner is not None else value
    return kind(**arguments)


def _lay_over(tree: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict) and "name" not in value:
            _lay_over(tree[key], value)
        else:
            tree[key] = value


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *groups, leaf = key.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
    tree[leaf] = value


def install() -> None:
    """Puts the two modules in place."""
    parsing = types.ModuleType("jsonargparse")
    parsing.ArgumentError = Exception
    cli = types.ModuleType("lightning.pytorch.cli")
    cli.LightningCLI, cli.LightningArgumentParser = LightningCLI, _Parser
    sys.modules |= {"jsonargparse": parsing, "lightning.pytorch.cli": cli}
