"""Reads YAML as plain values (numbers, strings, lists, mappings), which cannot name a class or another file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from maskgit_pl.checks import shorten

__all__ = ["NO_CODE", "check_plain", "parse_yaml", "read_yaml", "set_key"]

NO_CODE = "recipes name registered objects, not classes"
_MAX_BYTES = 200_000  # PyYAML parses about 200 kB per second
_MAX_DEPTH = 16


class _PlainLoader(yaml.SafeLoader):
    """A SafeLoader that rejects aliases (a few bytes can expand to gigabytes) and repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML is untyped
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed in recipes", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002  # PyYAML's
        # PyYAML would silently keep the last of two equal keys.
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            fault = "is not a string" if not isinstance(key, str) else "appears twice" if key in seen else None
            if fault is not None:
                text = f"the key {shorten(key)} {fault}"
                raise yaml.constructor.ConstructorError(None, None, text, key_node.start_mark)
            seen.add(key)
        made: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return made


def _construct_number(loader: _PlainLoader, node: yaml.ScalarNode) -> Any:
    """Reads a number as YAML 1.2 does: PyYAML would read 010 as 8, and 12:30 as 750."""
    if ":" in node.value:
        return node.value
    if node.tag.endswith(":float"):
        return loader.construct_yaml_float(node)
    text = node.value.replace("_", "")
    return int(text, 10 if text.lstrip("+-").isdigit() else 0)


for _kind in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _construct_number)
_PlainLoader.add_implicit_resolver(  # floats of YAML 1.2: PyYAML would read 1e-3 as a string
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(file: Path) -> dict[str, Any]:
    """Reads a YAML file as plain values.

    Raises:
        ValueError: if the file is over 200 kB, not YAML, nested too deep or not a mapping, or holds an alias, a
            repeated key, a non-finite number, a value that is not plain, or a key that names code. The message is one
            line.
    """
    # Reading a FIFO would block.
    if file.exists() and not file.is_file():
        raise ValueError(f"recipe {file} must be a regular file")
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(f"recipe {file} must have at most {_MAX_BYTES} bytes, got {file.stat().st_size}")
    try:
        tree = parse_yaml(file.read_text(encoding="utf-8"))
        if tree is not None and not isinstance(tree, dict):
            raise ValueError(f"it must be a mapping, got {shorten(tree)}")
        check_plain(tree)
    except ValueError as error:
        raise ValueError(f"recipe {file}: {error}") from error
    return tree or {}


def parse_yaml(text: str) -> Any:
    """Parses YAML.

    Raises:
        ValueError: if the text is invalid. The message is one line.
    """
    with _one_line():
        return yaml.load(text, Loader=_PlainLoader)  # a SafeLoader


def set_key(text: str, key: str, value: str) -> str:
    """Sets a key of a YAML mapping to a plain word. All other lines stay as they are.

    1. Remove all lines of each entry with this key.
    2. Add the new entry before the others.
    3. Check that only this key has changed.

    Args:
        text: Mapping with one key per line, or nothing.
        key: Key of the outer mapping.
        value: Word that needs no quotes.

    Raises:
        ValueError: if the text is invalid, or no such mapping. The message is one line.
    """
    rule = f"it must be a mapping with one key per line, so that {key} can be set"
    with _one_line():
        root = yaml.compose(text, Loader=_PlainLoader)
    if root is not None and (not isinstance(root, yaml.MappingNode) or root.flow_style):
        raise ValueError(rule)
    entries = root.value if root is not None else []
    # 1. From the end, so that the places of the entries before it stay valid.
    kept = text
    for name, node in reversed(entries):
        if name.value == key:
            # The mark after a block is at the next entry; after another value, it is in its last line.
            start, stop = _start_of_line(text, name.start_mark.index), node.end_mark.index
            last = _start_of_line(text, stop)
            next_line = last if not text[last:stop].strip() else text.find("\n", stop) + 1 or len(text)
            kept = kept[:start] + kept[next_line:]
    # 2.
    indent = " " * root.start_mark.column if root is not None else ""
    changed = f"{indent}{key}: {value}\n{kept}"
    # 3. By repr(), since NaN is not equal to itself.
    others = parse_yaml(kept) or {}
    is_kept = isinstance(others, dict) and [*others] == [name.value for name, _ in entries if name.value != key]
    if not is_kept or repr(parse_yaml(changed)) != repr({key: value, **others}):
        raise ValueError(rule)
    return changed


def _start_of_line(text: str, place: int) -> int:
    return text.rfind("\n", 0, place) + 1


@contextmanager
def _one_line() -> Iterator[None]:
    """Turns the errors of PyYAML into a ``ValueError`` of one line."""
    try:
        yield
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ValueError(f"{place}{getattr(error, 'problem', None) or ' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except (UnicodeError, OverflowError) as error:
        raise ValueError(str(error)) from error


def check_plain(node: Any, path: str = "", depth: int = 0) -> None:
    """Checks that a tree is plain data.

    Args:
        node: Tree, or a part of it.
        path: Dotted key of the part, for messages.
        depth: Nesting depth of the part.

    Raises:
        ValueError: if the tree is nested too deep, or holds another type, a non-finite number, or a key that names
            code. The message names the key.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"{path[:80]}: it is nested too deep")
    if isinstance(node, dict):
        for key, value in node.items():
            where = f"{path}.{key}" if path else str(key)
            if key in ("class_path", "init_args"):
                raise ValueError(f"{where} cannot be set: {NO_CODE}")
            check_plain(value, where, depth + 1)
    elif isinstance(node, list):
        for item in node:
            check_plain(item, path, depth + 1)
    elif isinstance(node, float) and not math.isfinite(node):
        raise ValueError(f"{path} must be finite, got {node}")
    elif not isinstance(node, str | int | float | bool | None):
        raise ValueError(f"{path} must be a number, a word, a list or a mapping, got {shorten(node)}; quote it")
