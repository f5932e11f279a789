"""A folder of recorded arrays, and the comparison of its files with its manifest."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from maskgit_pl.importers.checkpoints import read_flax

__all__ = ["Folder", "FolderError"]

_BESIDE = {"README.md", "check.py", "recipe.py"}  # files of a folder that hold no arrays, with the manifest itself


class FolderError(ValueError):
    """A folder that cannot be read: it does not exist, or has no manifest, or a broken file."""


class Folder:
    """The arrays of a folder, each file read once.

    Args:
        path: The folder.
        manifest: Name of its manifest: ``files`` maps names to ``bytes`` and to ``arrays`` (name -> shape and dtype) or
            ``tree`` (path -> the same) with ``n_params``; everything else describes the recording.

    Raises:
        FolderError: No such folder, or no readable manifest in it.
    """

    def __init__(self, path: Path, manifest: str = "manifest.json") -> None:
        self.path = path
        self.manifest_name = manifest
        if not path.is_dir():
            raise FolderError(f"golden folder {path}: there is no such folder")
        try:
            self.manifest: dict[str, Any] = json.loads((path / manifest).read_text())
            self.files: dict[str, dict[str, Any]] = self.manifest["files"]
        except FileNotFoundError:
            raise FolderError(f"golden folder {path}: {manifest} is missing") from None
        except (ValueError, KeyError, TypeError) as error:
            raise FolderError(f"golden folder {path}: {manifest} is no manifest: {error!r}") from None
        self.config: dict[str, Any] = self.manifest.get("config", {})
        self.arrays = cache(self._arrays)
        self.tree = cache(self._tree)

    @property
    def present(self) -> list[str]:
        """Names of the files with arrays that are in the folder, sorted."""
        return sorted(file.name for file in self.path.iterdir() if file.suffix in (".npz", ".msgpack"))

    def __contains__(self, file: str) -> bool:
        return (self.path / file).is_file()

    def names(self, file: str) -> list[str]:
        """Names of a file's arrays, or paths of its parameters."""
        return list(self.contents(file))

    def contents(self, file: str) -> dict[str, np.ndarray]:
        """Arrays or parameters of a file.

        Raises:
            FolderError: The file is broken.
        """
        return self.arrays(file) if file.endswith(".npz") else self.tree(file)

    def problems(self) -> Iterator[str]:
        """Returns a line for each difference between the folder and its manifest."""
        for file in sorted(self.files.keys() - set(self.present)):
            yield f"{file}: the manifest names it, the folder lacks it"
        beside = _BESIDE | {self.manifest_name}
        for entry in sorted(self.path.iterdir()):
            if entry.is_file() and entry.name not in self.files and entry.name not in beside:
                yield f"{entry.name}: the folder has it, the manifest does not name it"
        for file in self.present:
            if file in self.files:
                yield from self._differences(file)

    def _differences(self, file: str) -> Iterator[str]:
        expected, has = self.files[file], self.contents(file)
        size = (self.path / file).stat().st_size
        if size != expected.get("bytes"):
            yield f"{file}: the manifest says {expected.get('bytes')} bytes, it has {size}"
        said = expected.get("arrays" if file.endswith(".npz") else "tree", {})
        for name in sorted(said.keys() | has.keys()):
            seen = [list(has[name].shape), _dtype_name(has[name])] if name in has else "nothing"
            if said.get(name, "nothing") != seen:
                yield f"{file} {name}: the manifest says {said.get(name, 'nothing')}, it has {seen}"
        total = sum(array.size for array in has.values())
        if not file.endswith(".npz") and expected.get("n_params") != total:
            yield f"{file}: the manifest says {expected.get('n_params')} parameters, it has {total}"

    def _arrays(self, file: str) -> dict[str, np.ndarray]:
        try:
            with (self.path / file).open("rb") as stream, np.load(stream) as archive:
                return {name: archive[name] for name in archive.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise FolderError(f"golden file {self.path / file}: it cannot be read: {error}") from None

    def _tree(self, file: str) -> dict[str, np.ndarray]:
        try:
            return read_flax(self.path / file)
        except (OSError, ValueError, TypeError) as error:
            raise FolderError(f"golden file {self.path / file}: it cannot be read: {error}") from None


def _dtype_name(array: np.ndarray) -> str:
    return str(array.dtype) if array.dtype.kind == "U" else array.dtype.name
