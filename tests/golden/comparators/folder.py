"""A folder of recorded arrays with its manifest."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from maskgit_pl.importers.checkpoints import read_flax


class Folder:
    """The arrays of a folder, each file read once.

    Args:
        path: The folder.
        manifest: Name of its manifest: ``files`` has an entry for each file, everything else describes the recording.
    """

    def __init__(self, path: Path, manifest: str = "manifest.json") -> None:
        self.path = path
        self.manifest_name = manifest
        self.manifest: dict[str, Any] = json.loads((path / manifest).read_text())
        self.config: dict[str, Any] = self.manifest.get("config", {})
        self.arrays = cache(self._arrays)
        self.tree = cache(self._tree)

    @property
    def present(self) -> list[str]:
        """Names of the files with arrays that are in the folder, sorted."""
        return sorted(file.name for file in self.path.iterdir() if file.suffix in (".npz", ".msgpack"))

    def __contains__(self, file: str) -> bool:
        return (self.path / file).is_file()

    def contents(self, file: str) -> dict[str, np.ndarray]:
        """Returns the arrays or parameters of a file by name or path."""
        return self.arrays(file) if file.endswith(".npz") else self.tree(file)

    def _arrays(self, file: str) -> dict[str, np.ndarray]:
        with (self.path / file).open("rb") as stream, np.load(stream) as archive:
            return {name: archive[name] for name in archive.files}

    def _tree(self, file: str) -> dict[str, np.ndarray]:
        return read_flax(self.path / file)
