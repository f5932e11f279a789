"""The comparison of one recorded array with ours: the difference, and the tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maskgit_pl.importers.released import parameters

TOLERANCE = 1e-4  # absolute, of float32 values; two float32 implementations differ by about a tenth of it


@dataclass(frozen=True)
class Comparison:
    """A recorded array beside ours.

    Attributes:
        file: Name of its file.
        array: Name of the array, or the path of a parameter.
        difference: Largest absolute difference; of arrays that must be equal, how many elements are not.
        tolerance: Largest difference allowed; 0 where arrays must be equal.
        kind: ``close``, ``equal``, or ``input``: a finite array that feeds computations.
        agrees: The verdict.
        note: More for the reader, such as the shapes if they differ.
    """

    file: str
    array: str
    difference: float
    tolerance: float
    kind: str
    agrees: bool
    note: str = ""

    def __str__(self) -> str:
        allowed = {"close": f"{self.tolerance:.1e}", "equal": "equal", "input": "input"}[self.kind]
        seen = f"{self.difference:.1e}" if self.kind == "close" else f"{self.difference:.0f}"
        verdict = "ok" if self.agrees else "OFF"
        return f"{self.file:38} {self.array:72} {seen:>8} {allowed:>8}  {verdict} {self.note}".rstrip()


def close(
    file: str, array: str, ours: object, recorded: np.ndarray, *, tolerance: float = TOLERANCE, note: str = ""
) -> Comparison:
    """Compares float arrays: infinities and NaN must be at the same places."""
    mine, theirs = _plain(ours).astype(np.float64), np.asarray(recorded, np.float64)
    if mine.shape != theirs.shape:
        return _shapes_differ(file, array, mine, theirs, "close", tolerance)
    same = (mine == theirs) | (np.isnan(mine) & np.isnan(theirs))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(mine - theirs))
    difference = float(np.where(np.isnan(apart), np.inf, apart).max(initial=0.0))
    return Comparison(file, array, difference, tolerance, "close", difference <= tolerance, note)


def equal(file: str, array: str, ours: object, recorded: np.ndarray, *, note: str = "") -> Comparison:
    """Compares ids, counts, masks or names, which must be equal."""
    mine, theirs = _plain(ours), np.asarray(recorded)
    if mine.shape != theirs.shape:
        return _shapes_differ(file, array, mine, theirs, "equal", 0.0)
    unequal = int((mine != theirs).sum())
    return Comparison(file, array, unequal, 0.0, "equal", unequal == 0, note)


def present(
    file: str, ours: Mapping[str, object], recorded: Mapping[str, np.ndarray], *, note: str = ""
) -> Iterator[Comparison]:
    """Compares those arrays of ours that are recorded: floats within the tolerance, all others for equality."""
    for name in ours.keys() & recorded.keys():
        compare = close if recorded[name].dtype.kind == "f" else equal
        yield compare(file, name, ours[name], recorded[name], note=note)


def inputs(file: str, recorded: Mapping[str, np.ndarray], names: Iterable[str]) -> Iterator[Comparison]:
    """Counts the arrays of some names, where they are recorded, as inputs of computations: they must be finite."""
    for name in recorded.keys() & set(names):
        array = recorded[name]
        infinite = int((~np.isfinite(array)).sum()) if array.dtype.kind == "f" else 0
        yield Comparison(file, name, infinite, 0.0, "input", infinite == 0)


def gradients(
    file: str,
    tree: Mapping[str, np.ndarray],
    ours: Mapping[str, Tensor],
    to_ours: Callable[[dict[str, np.ndarray]], dict[str, Tensor]],
    *,
    tolerance: float,
) -> Iterator[Comparison]:
    """Compares a recorded gradient tree with our gradients, path by path.

    Args:
        file: Name of its file.
        tree: Path -> recorded gradient.
        ours: Name of a parameter of ours -> its gradient.
        to_ours: Map from parameters of the released code to ours: a rearrangement, which maps gradients too.
        tolerance: Largest absolute difference allowed.
    """
    paths = {path.removeprefix("params/"): path for path in tree}
    recorded = to_ours(parameters(dict(tree)))
    origin = to_ours({path: np.full(tree[full].shape, n, np.float32) for n, (path, full) in enumerate(paths.items())})
    apart = torch.cat([(ours[name] - recorded[name]).abs().flatten() for name in recorded]).double().numpy()
    path_of = torch.cat([origin[name].flatten() for name in recorded]).long().numpy()
    largest, counts = np.zeros(len(paths)), np.bincount(path_of, minlength=len(paths))
    np.maximum.at(largest, path_of, np.where(np.isnan(apart), np.inf, apart))
    for full, difference, count in zip(paths.values(), largest.tolist(), counts, strict=True):
        complete = count == tree[full].size
        note = "" if complete else f"{count} of its {tree[full].size} numbers were compared"
        yield Comparison(file, full, difference, tolerance, "close", complete and difference <= tolerance, note)


def _plain(value: object) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _shapes_differ(
    file: str, array: str, mine: np.ndarray, theirs: np.ndarray, kind: str, tolerance: float
) -> Comparison:
    note = f"ours has the shape {mine.shape}, the recorded one {theirs.shape}"
    return Comparison(file, array, float("inf"), tolerance, kind, False, note)
