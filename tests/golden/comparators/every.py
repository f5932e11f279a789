"""Runs all comparators over a folder, and gives the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from comparators.comparison import LARGEST, Comparison, given
from comparators.decoding import compare_decoding
from comparators.discriminator import compare_discriminator
from comparators.folder import Folder, FolderError
from comparators.losses import compare_losses
from comparators.schedules import compare_schedules
from comparators.tokenizer import compare_vqvae
from comparators.transformer import compare_transformer

__all__ = ["Report", "check_file", "check_folder", "collect", "files_of"]

_COMPARATORS: dict[str, Callable[[Folder, str], Iterator[Comparison]]] = {  # by how the name of an .npz begins
    "decode_": compare_decoding,
    "discriminator": compare_discriminator,
    "losses": compare_losses,
    "schedules": compare_schedules,
    "transformer_": compare_transformer,
    "vqvae": compare_vqvae,
}
_BESIDE_AN_NPZ = ("_checkpoint.msgpack", "_grads.msgpack", "_r1_grads.msgpack")


@dataclass
class Report:
    """The result of a check.

    Attributes:
        comparisons: One per recorded array or parameter, the worst if it was compared in several ways.
        problems: Other problems, a line each.
    """

    comparisons: list[Comparison] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Returns whether everything was compared and agrees."""
        return not self.problems and all(comparison.agrees for comparison in self.comparisons)

    @property
    def agreeing(self) -> int:
        """The number of arrays that agree."""
        return sum(comparison.agrees for comparison in self.comparisons)

    def summary(self) -> str:
        """The last line: ``N of M arrays agree``, and how many of the M are inputs."""
        inputs = sum(comparison.kind == "input" for comparison in self.comparisons)
        total = len(self.comparisons)
        return f"{self.agreeing} of {total} arrays agree ({total - inputs} compared, {inputs} inputs)"

    def failures(self) -> list[str]:
        """Returns the lines that name each disagreement."""
        return [*self.problems, *(str(made) for made in self.comparisons if not made.agrees)]

    def __iadd__(self, other: Report) -> Report:
        return Report(self.comparisons + other.comparisons, self.problems + other.problems)


def check_folder(path: Path) -> Report:
    """Compares every array of every file of a folder, and the folder with its manifest.

    Raises:
        FolderError: The folder, its manifest or one of its files cannot be read.
    """
    folder = Folder(path)
    report = Report(problems=list(folder.problems()))
    for file in files_of(folder):
        report += check_file(folder, file)
    return report


def files_of(folder: Folder) -> list[str]:
    """Returns the files to be checked one by one: every .npz, and trees without one."""
    arrays = [file for file in folder.present if file.endswith(".npz")]
    covered = {file.replace(".npz", end) for file in arrays for end in _BESIDE_AN_NPZ}
    return arrays + [file for file in folder.present if file.endswith(".msgpack") and file not in covered]


def check_file(folder: Folder, file: str) -> Report:
    """Compares a file and the checkpoint and gradients beside it."""
    group = [file, *(file.replace(".npz", end) for end in _BESIDE_AN_NPZ if file.endswith(".npz"))]
    group = [name for name in dict.fromkeys(group) if name in folder]
    return collect(folder, group, _compare(folder, file, group))


def collect(folder: Folder, files: list[str], comparisons: Iterator[Comparison]) -> Report:
    """Returns a comparison for each array of some files; an array without one is named.

    Raises:
        FolderError: One of the files cannot be read.
    """
    made: list[Comparison] = []
    problems = []
    try:
        made.extend(comparisons)
    except FolderError:
        raise
    except Exception as error:  # any error of an array that does not fit is reported, and the other files are compared
        problems = [f"{files[0]}: comparing ended with {type(error).__name__}: {error}".replace("\n", " ")]
    seen = {(comparison.file, comparison.array) for comparison in made}
    rest = [
        Comparison(file, array, float("nan"), 0.0, "equal", False, "not compared")
        for file in files
        for array in folder.names(file)
        if (file, array) not in seen
    ]
    return Report([*_worst(made), *rest], problems)


def _worst(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Returns one comparison per array: that which disagrees, or uses most of its tolerance."""
    found: dict[tuple[str, str], Comparison] = {}
    for made in comparisons:
        key = (made.file, made.array)
        found[key] = max(found.get(key, made), made, key=_badness)
    return list(found.values())


def _compare(folder: Folder, file: str, group: list[str]) -> Iterator[Comparison]:
    for name in group:
        if name.endswith("_checkpoint.msgpack"):
            yield from _checkpoint(folder, name)
    for beginning, compare in _COMPARATORS.items():
        if file.startswith(beginning) and file.endswith(".npz"):
            yield from compare(folder, file)


def _checkpoint(folder: Folder, file: str) -> Iterator[Comparison]:
    """Checks that all weights are finite float32; the importer checks names and shapes."""
    for path, array in folder.tree(file).items():
        yield given(file, path, array, dtype="float32", low=-LARGEST, high=LARGEST)


def _badness(comparison: Comparison) -> tuple[bool, float]:
    """Returns whether it disagrees, and the share of its tolerance that it uses."""
    return not comparison.agrees, comparison.difference / (comparison.tolerance or 1.0)
