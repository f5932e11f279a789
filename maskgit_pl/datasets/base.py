"""The interface of a public data set: how it is downloaded, and how its files become samples."""

from __future__ import annotations

import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from maskgit_pl.shards.samples import Source

__all__ = ["Dataset", "run_command"]


class Dataset(ABC):
    """A public data set.

    Attributes:
        name: Name for the command line and for recipes.
        title: Name for people.
        contents: Number and size of the images, classes and licence, in a few words.
        image_sizes: Sides of the square images in pixels; the first one is the default.
        source: Files that ``open`` takes in place of a download, such as ``the file bmng.jpg``.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    contents: ClassVar[str]
    image_sizes: ClassVar[tuple[int, ...]]
    source: ClassVar[str]

    @abstractmethod
    def fetch(self, raw: Path) -> Path:
        """Downloads the files, unless they are there, and returns the path that ``open`` takes.

        Args:
            raw: Folder that keeps the downloaded files.

        Raises:
            FileNotFoundError: if no source can be reached. The message names the ways out.
        """

    @abstractmethod
    def open(self, path: Path, *, image_size: int) -> Source:
        """Checks the files and opens them.

        Args:
            path: The files; see ``source``.
            image_size: One of ``image_sizes``.

        Raises:
            ValueError: if a file is missing or is not the known one.
        """


def run_command(command: Sequence[str], *, folder: Path, seconds: float) -> None:
    """Runs a command in a folder.

    Raises:
        OSError: if it fails or takes longer than ``seconds``. The end of its output is the message.
    """
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{Path(command[0]).name}: no answer in {seconds:g} s") from error
    if done.returncode:
        said = " ".join(done.stderr.split())[-300:]
        raise OSError(f"{' '.join([Path(command[0]).name, *command[-2:]])}: {said}")
