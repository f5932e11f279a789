"""Recipes: which YAML files make up a run, read safely, before anything heavy is imported.

Merge order: base, data set, RECIPE from left to right, cluster; flags come last. Values from the data and the tokenizer
at hand (classes, codebook, grid) lie below all of them. A recipe is data: it names registered things and never a class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from maskgit_pl.registry import nearest

__all__ = [
    "STAGES",
    "Plan",
    "Stage",
    "check_overrides",
    "fitting_layer",
    "is_causal",
    "read_yaml",
    "recipe_files",
    "recipe_value",
    "recipes_folder",
]

Stage = Literal["tokenizer", "transformer"]

STAGES: tuple[Stage, ...] = ("tokenizer", "transformer")
_MAX_BYTES = 1_000_000
_REFUSED = ("class_path", "callbacks", "logger", "plugins", "profiler")
# What a transformer with causal attention has no use for: it masks nothing, and draws token after token.
_MASKED_ALONE = (
    "model.mask_schedule",
    "model.min_mask_ratio",
    "model.decoding.num_steps",
    "model.decoding.token_selector",
    "model.decoding.tokens_per_step",
    "model.decoding.mask_schedule",
    "model.decoding.context_cache",
)


@dataclass(frozen=True)
class Plan:
    """A stage of a run as its command names it, with what the checks before it have found.

    Args:
        stage: Which.
        files: Recipe files in merge order.
        overrides: Flags that set single values.
        shards: Data folder.
        folder: ``runs/RUN``; the stage's own is in it.
        tokenizer: Pretrained tokenizer folder, for stage 2.
        pretrained: Pretrained folder of this stage whose weights a new run begins from, and whose sizes it takes.
    """

    stage: Stage
    files: Sequence[Path]
    overrides: Sequence[str]
    shards: Path
    folder: Path
    tokenizer: Path | None = None
    pretrained: Path | None = None

    @property
    def stage_folder(self) -> Path:
        """``runs/RUN/STAGE``: checkpoints, logs and papers of the stage."""
        return self.folder / self.stage

    @property
    def checkpoints(self) -> Path:
        """``runs/RUN/STAGE/checkpoints``."""
        return self.stage_folder / "checkpoints"


def recipes_folder() -> Path:
    """``recipes/`` of the working directory, else the copy that was installed with the package.

    Raises:
        FileNotFoundError: Neither is there.
    """
    candidates = (Path("recipes"), Path(__file__).parents[2] / "recipes", Path(__file__).parents[1] / "recipes")
    for folder in candidates:
        if (folder / "transformer" / "base.yaml").is_file():
            return folder
    raise FileNotFoundError("recipes: no folder recipes/ here; run from the repository, or reinstall maskgit_pl")


def recipe_files(stage: Stage, *, dataset: str, names: Iterable[str], cluster: str) -> list[Path]:
    """The files of a run in merge order.

    Args:
        stage: Whose recipes.
        dataset: Its file is ``<dataset>.yaml``; without one, ``own-images.yaml``. The default data set's is the base.
        names: RECIPE, from left to right. A name must be a recipe of some stage; this stage takes those it has.
        cluster: A file of ``recipes/cluster``.

    Raises:
        FileNotFoundError: A name that no stage has, with the nearest and the list.
    """
    folder = recipes_folder()
    files = [folder / stage / "base.yaml"]
    if dataset != DEFAULT_DATASET:
        own = folder / stage / f"{dataset}.yaml"
        files.append(own if own.is_file() else folder / stage / "own-images.yaml")
    for name in names:
        homes = [each for each in STAGES if (folder / each / f"{name}.yaml").is_file()]
        if not homes:
            known = {file.stem for each in STAGES for file in (folder / each).glob("*.yaml")}
            raise FileNotFoundError(f"recipe {name!r}: no such file in {folder}: {nearest(name, known)}")
        if stage in homes:
            files.append(folder / stage / f"{name}.yaml")
    on = folder / "cluster" / f"{cluster}.yaml"
    if not on.is_file():
        known = {file.stem for file in on.parent.glob("*.yaml")}
        raise FileNotFoundError(f"cluster {cluster!r}: no such file in {on.parent}: {nearest(cluster, known)}")
    return [*files, on]


DEFAULT_DATASET = "fashion-mnist"


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases (a few bytes can unfold to gigabytes) and without doubled keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML is untyped
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed in recipes", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        made: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return made


def read_yaml(file: Path) -> dict[str, Any]:
    """One recipe file as plain values.

    Raises:
        ValueError: Over 1 MB, not YAML, an alias, a doubled key, no mapping, or a key that would import code.
    """
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(f"recipe {file}: at most 1 MB is read, got {file.stat().st_size} bytes")
    try:
        tree = yaml.load(file.read_text(), Loader=_PlainLoader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {file}: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"recipe {file}: a mapping is needed, got {type(tree).__name__}")
    _refuse_code(tree, str(file), "")
    return tree


def _refuse_code(node: Any, file: str, path: str) -> None:
    if isinstance(node, list):
        for item in node:
            _refuse_code(item, file, path)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        where = f"{path}.{key}" if path else str(key)
        if key in _REFUSED:
            raise ValueError(f"recipe {file}: {where}: recipes name registered things, not classes; the key is refused")
        _refuse_code(value, file, where)


def recipe_value(files: Iterable[Path], overrides: Sequence[str], key: str) -> Any:
    """What the files and flags of a run say of one key, before anything is built from them; None if nothing.

    Args:
        files: Recipe files in merge order.
        overrides: Flags, ``--KEY=VALUE`` or ``--KEY VALUE``, which come last.
        key: Dotted, such as ``data.source``.
    """
    value: Any = None
    for file in files:
        node: Any = read_yaml(file)
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        value = value if node is None else node
    for place, word in enumerate(overrides):
        flag, equals, given = word.partition("=")
        if flag == f"--{key}":
            value = yaml.safe_load(given if equals else "".join(overrides[place + 1 : place + 2]))
    return value


def is_causal(files: Iterable[Path], overrides: Sequence[str]) -> bool:
    """Whether the files and flags of a run of stage 2 are those of the sequential baseline.

    Raises:
        ValueError: They are, and a flag says what it has no use for.
    """
    if recipe_value(files, overrides, "model.network.attention") != "causal":
        return False
    for word in overrides:
        flag = word.partition("=")[0].removeprefix("--")
        key = next((key for key in _MASKED_ALONE if f"{flag}.".startswith(f"{key}.")), None)
        if key is not None:
            raise ValueError(
                f"flag --{flag}: with causal attention no token is masked, and they are drawn one after the other; got "
                f"{key}, which is for bidirectional attention; leave the flag out"
            )
    return True


def fitting_layer(file: Path) -> tuple[dict[str, Any], list[str]]:
    """A recipe file for causal attention: what is left of it, and the keys that were taken out."""
    tree = read_yaml(file)
    return tree, [key for key in _MASKED_ALONE if _taken_out(tree, key.split("."))]


def _taken_out(node: Any, path: list[str]) -> bool:
    """Whether a key was there and is no more."""
    if len(path) > 1:
        return isinstance(node, dict) and _taken_out(node.get(path[0]), path[1:])
    return isinstance(node, dict) and node.pop(path[0], _taken_out) is not _taken_out


def check_overrides(overrides: Iterable[str]) -> None:
    """Refuses flags that would import code, as ``read_yaml`` refuses such keys.

    Raises:
        ValueError: The flag is named.
    """
    for word in overrides:
        if word.startswith("--config") or any(refused in word for refused in _REFUSED):
            raise ValueError(f"flag {word!r}: flags set single values of a recipe; write a recipe file for more")
