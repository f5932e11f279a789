"""Finds the folders of a run to measure, and reads its recipe. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskgit_pl.data.sources.public import how_to_get
from maskgit_pl.files import read_json, read_yaml
from maskgit_pl.pipeline.sharing import bundled_models, local_folder
from maskgit_pl.runs.recipe import value_at, without_keys
from maskgit_pl.runs.variants import FOLDER

_MAX_CONFIG_BYTES = 8_000_000  # of a model that may be a stranger's
_UNTRAINED = (  # keys that do not affect the trained weights, and that of the seed
    "model.decoding", "data.path", "data.token_store", "model.tokenizer", "checkpoint_every", "keep_last", "keep_every",
    "hang_seconds", "trainer.val_check_interval", "trainer.limit_val_batches", "trainer.num_sanity_val_steps",
    "trainer.log_every_n_steps", "data.validation_batch", "data.validation_samples", "data.seed", "model.seed",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolders:
    """The folders of a run to measure."""

    pretrained: Path  # with ``tokenizer/`` and ``transformer/``
    run: Path  # the pretrained folder itself if it belongs to no run
    data: Path
    references: Path  # features of real images, and a classifier, which all runs of the same data share

    @property
    def classifier(self) -> Path:
        """The folder of the data's own classifier."""
        return self.references / "small"


def data_name(data: Path) -> str:
    """Returns the name of a data folder for ledgers and pages, which is also that of a folder of results."""
    # The paths . and .. have a name only once they are resolved.
    return data.name if data.name not in ("", "..") else data.resolve().name


def find_run(run: Path | str, *, data: Path | None = None) -> RunFolders:
    """Finds the folders of a run.

    Args:
        run: Run folder, pretrained folder, or the name of a model in the package, whose results are written
            to ``runs/NAME``.
        data: Data folder; None for the data that the run was trained on.
    """
    return _folders(local_folder(run), data)


def find_tokenizer_folders(folder: Path | str, *, data: Path | None = None) -> RunFolders:
    """Finds the folders of a tokenizer, which needs no transformer beside it; see ``find_run``.

    ``folder`` may also be the folder of the tokenizer itself.
    """
    path = Path(folder)
    if str(folder) in bundled_models() and not path.is_dir():
        return find_run(folder, data=data)
    # RUN/tokenizer of a run holds the training; its config.yaml is no config.json.
    for pretrained in (path / "pretrained", path, path.parent if path.name == "tokenizer" else path):
        if (pretrained / "tokenizer" / "config.json").is_file():
            return _folders(pretrained, data)
    raise FileNotFoundError(
        f"tokenizer {path}: no tokenizer there; name a run whose stage 1 has ended, or a folder of `maskgit export` or "
        "of an importer"
    )


def _folders(pretrained: Path, data: Path | None) -> RunFolders:
    # The run of RUN/pretrained; any other pretrained folder stands for itself.
    home = pretrained.parent if pretrained.name == "pretrained" else pretrained
    if pretrained in bundled_models().values():
        home = Path("runs", pretrained.name)
    path = data or _find_data(pretrained, home)
    if not path.is_dir():
        raise FileNotFoundError(f"data {path}: no such folder; choose another with --data")
    runs = home.absolute().parent
    runs = runs.parent if runs.name == FOLDER else runs
    references = runs / f"{path.absolute().name}-classifier"  # of all runs of the data, also those of ablations
    return RunFolders(pretrained, home, path, references)


def _find_data(pretrained: Path, home: Path) -> Path:
    """Returns the data folder that a run records, or ``data/shards/NAME`` for the name that an exported model has."""
    # Both stages record the data; a run may have only one of them.
    for stage in ("transformer", "tokenizer"):
        path = value_at(read_run_recipe(home / stage / "config.yaml"), "data.path")
        if isinstance(path, str):
            return Path(path)
    file, advice = pretrained / "config.json", "choose them with --data"
    node: Any = read_json(file, max_bytes=_MAX_CONFIG_BYTES) if file.is_file() else {}
    for key in ("run", "tokenizer", "settings", "data.path"):
        node = node.get(key) if isinstance(node, dict) else None
    if isinstance(node, str):
        path = Path("data/shards", Path(node).name)
        if path.is_dir():
            return path
        advice = f"it was {path.name}: {how_to_get(path.name, path)}, or {advice}"
    what = f"run {home}" if home.is_dir() else f"model {pretrained.name}"
    raise FileNotFoundError(f"{what} does not record the data folder that it was trained on; {advice}")


def read_run_recipe(file: Path) -> dict[str, Any]:
    """Reads the ``config.yaml`` of a run as plain values; a missing file gives an empty mapping."""
    return read_yaml(file) if file.is_file() else {}


def trained_recipe(folder: Path) -> dict[str, Any]:
    """Returns the recipe of a stage of a run, without the seed and what does not affect the trained weights.

    Args:
        folder: Folder of the stage, such as ``RUN/transformer``; one without a recipe gives an empty mapping.
    """
    return remove_untrained(read_run_recipe(folder / "config.yaml"))


def remove_untrained(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a complete recipe without the seed and what does not affect the trained weights."""
    return without_keys(tree, _UNTRAINED)
