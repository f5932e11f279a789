"""From ordinary WebDataset tars to manifests beside them; the tars are not touched.

Used by ``maskgit data index`` for shards made elsewhere (open_clip's and img2dataset's layouts) and by the writer for
its own. What would lose samples in silence is refused, all of it in one list, or left out and counted if asked for.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from maskgit_pl.checks import check_number
from maskgit_pl.shards.braces import expand_braces
from maskgit_pl.shards.manifest import (
    INDEX_DTYPE,
    ImageRange,
    Manifest,
    Shard,
    Split,
    index_sha256,
    save_manifest,
    union,
)
from maskgit_pl.shards.parallel import choose_workers, run_jobs
from maskgit_pl.shards.scan import NO_LABEL, Fault, Labels, ShardScan, format_counts, scan_shard

__all__ = ["IndexResult", "find_shards", "index_shards", "locate_shards", "split_shards"]

PROGRESS = ".index.partial"
UNLABELLED = "image"  # the one class of data without labels
_MAX_COUNTS_BYTES = 64 * 2**20  # of a file that says how many samples shards have
_VAL, _TEST, _TRAIN = r"val|valid|validation", r"test", r"train|training"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def locate_shards(place: str) -> tuple[Path, list[Path]]:
    """Returns the data folder and all its shards.

    Args:
        place: A folder, whose tars are taken, or those of its sub-folders; or a glob or brace expression of tars, such
            as ``data/{train,val}-{00000..00012}.tar``. The folder is the part before the first component with one.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: A URL or a command, or nothing is there.
    """
    folder = Path(place)
    if not os.path.isdir(place):  # of a Path, it raises if the name is too long
        if _URL.match(place):
            kind = place.partition(":")[0]
            raise ValueError(f"shards {place!r}: local files are read, got {kind}:; fetch the shards first")
        parts = folder.parts
        magic = next((n for n, part in enumerate(parts) if re.search(r"[*?\[{]", part)), len(parts) - 1)
        folder, pattern = Path(*parts[:magic]), "/".join(parts[magic:])
        if not folder.is_dir():
            raise FileNotFoundError(f"data folder {folder}: no such folder")
        return folder, find_shards(folder, pattern)
    shards = _glob(folder, "*.tar") or _glob(folder, "*/*.tar")
    if not shards:
        raise ValueError(f"data folder {folder}: nothing in it matches *.tar; name the shards by a pattern")
    return folder, shards


def find_shards(folder: str | Path, pattern: str) -> list[Path]:
    """Returns the tars that a pattern names inside a folder, sorted.

    Args:
        folder: The data folder.
        pattern: A glob, or one with WebDataset's braces: ``train-*.tar``, ``{00000..00012}.tar``, ``{a,b}/*.tar``.

    Raises:
        ValueError: The pattern leaves the folder, names no file, or a brace form names a file that is not there.
    """
    folder = Path(folder)
    found: set[Path] = set()
    for one in _expand(pattern):
        if _URL.match(one) or "::" in one:
            raise ValueError(f"shard pattern {pattern!r}: local files are read, got {one!r}; fetch the shards first")
        if one.startswith(("/", "~")) or ".." in one.split("/"):
            raise ValueError(f"shard pattern {pattern!r}: it must name files inside {folder}, not paths out of it")
        matches = _glob(folder, one)
        if not matches:
            raise ValueError(f"shard pattern {pattern!r}: nothing in {folder} matches {one!r}")
        found.update(matches)
    return sorted(found)


def split_shards(
    folder: Path,
    shards: Sequence[Path],
    *,
    train: str | None = None,
    val: str | None = None,
    val_fraction: float | None = None,
) -> tuple[dict[Split, list[Path]], str]:
    """Decides which shards are train and which val.

    Args:
        folder: The data folder.
        shards: All of them.
        train: Pattern of the train shards; None for those that are not val.
        val: Pattern of the val shards; None for those whose path says val, valid, validation or (without one) test.
        val_fraction: Share of the shards that become val, the last ones, whatever their names; None for 0.1 where no
            name says val.

    Returns:
        The shards of each split, and a sentence on how they were told apart.

    Raises:
        ValueError: A shard would be in both, or a split would be empty.
    """
    fraction = 0.1 if val_fraction is None else val_fraction
    check_number("val fraction", fraction, "(0, 1)")
    train_shards = None if train is None else find_shards(folder, train)
    val_shards, how = (None, "") if val is None else (find_shards(folder, val), f"val is {val}")
    pool = shards if train_shards is None else train_shards
    if val_shards is None and val_fraction is None:
        val_shards, how = _find_val_by_name(folder, shards if train_shards is None else set(shards) - set(train_shards))
    if val_shards is None:
        val_shards, how = _take_last(pool, fraction, folder)
    if train_shards is None:
        rest = [shard for shard in pool if shard not in set(val_shards)]
        # where shards are called train, the others (test beside val, say) are neither
        train_shards = [shard for shard in rest if _has_word(folder, shard, _TRAIN)] or rest
    elif how.startswith("the last"):
        train_shards = [shard for shard in train_shards if shard not in set(val_shards)]
    _check_splits(folder, train_shards, val_shards)
    return {"train": train_shards, "val": val_shards}, how


@dataclass(frozen=True)
class IndexResult:
    """The result of indexing a data folder: manifests, and what stands in the tars but not in them, by split."""

    manifests: dict[Split, Manifest]
    ignored: dict[Split, dict[str, int]]
    notes: tuple[str, ...] = ()


def index_shards(
    folder: str | Path,
    shards: Mapping[Split, Sequence[Path]],
    *,
    classes: Sequence[str] | None = None,
    labels: str = "cls",
    lenient: bool = False,
    workers: int | None = 1,
    on_shard: Callable[[Split, int], object] = lambda split, total: None,
) -> IndexResult:
    """Reads the shards of every split and writes their manifests beside them.

    An interrupted run goes on: what is known of a shard stays in ``.index.partial`` until all are done, under its name,
    length and time of change.

    Args:
        folder: Where the shards lie and the manifests go.
        shards: The tars of each split, in the order in which samples are to be numbered.
        classes: Class names; without, the labels' own numbers up to the largest.
        labels: Where labels come from: ``"cls"``, ``"json:FIELD"`` or ``"none"``; see ``scan.Labels``.
        lenient: Leave out samples with a fault instead of refusing them.
        workers: Processes; they make no difference to the result. None: one a core, fewer for little data.
        on_shard: Told the split of each shard that is done, and how many shards the split has (for a progress bar).

    Raises:
        ValueError: Names every shard that is damaged or, unless lenient, has samples with a fault, with their counts.
    """
    folder = Path(folder)
    if labels == "none":
        classes = _only_class(classes)
    options = Labels(labels, None if classes is None else tuple(classes))
    workers = choose_workers(workers, work=sum(path.stat().st_size for of in shards.values() for path in of) / 2**28)
    names = {split: [path.relative_to(folder).as_posix() for path in paths] for split, paths in shards.items()}
    scans, progress = _scan_all(folder, names, options, lenient=lenient, workers=workers, on_shard=on_shard)
    miscounts = _find_miscounts(folder, names, scans)
    _raise_faults(folder, scans, [] if lenient else miscounts, lenient=lenient, labels=labels)
    if classes is None:
        largest = max((int(scan.rows["label"].max()) for scan in scans.values() if len(scan.rows)), default=0)
        classes = [str(label) for label in range(largest + 1)]
    made = {
        split: _make_manifest(folder, split, {name: scans[name] for name in of_split}, classes, labels)
        for split, of_split in names.items()
    }
    for manifest, rows in made.values():
        save_manifest(manifest, rows)
    progress.unlink(missing_ok=True)
    ignored = {split: _sum_counts(scans[name].ignored for name in of_split) for split, of_split in names.items()}
    manifests = {split: manifest for split, (manifest, _) in made.items()}
    return IndexResult(manifests, ignored, tuple(f"{name}: {fault}" for name, fault in miscounts))


def _only_class(classes: Sequence[str] | None) -> Sequence[str]:
    if classes is not None and len(classes) != 1:
        raise ValueError(f"class names: data without labels has one class, got {len(classes)} names")
    return classes or (UNLABELLED,)


def _make_manifest(
    folder: Path, split: Split, scans: Mapping[str, ShardScan], classes: Sequence[str], labels: str
) -> tuple[Manifest, npt.NDArray[np.void]]:
    rows = np.concatenate([scan.rows for scan in scans.values()])
    if not len(rows):
        raise ValueError(f"data {folder}, split {split}: no whole sample in {len(scans)} shards")
    rows["shard"] = np.repeat(np.arange(len(scans)), [len(scan.rows) for scan in scans.values()])
    shards = tuple(Shard(name, scan.bytes, len(scan.rows), scan.sha256) for name, scan in scans.items())
    images = union([scan.images for scan in scans.values() if scan.images is not None])
    left_out = _sum_counts({fault: found.count for fault, found in scan.faults.items()} for scan in scans.values())
    digest = index_sha256(rows)
    return Manifest(folder, split, shards, tuple(classes), images, digest, labels, left_out), rows


def _scan_all(
    folder: Path,
    names: Mapping[Split, Sequence[str]],
    labels: Labels,
    *,
    lenient: bool,
    workers: int,
    on_shard: Callable[[Split, int], object],
) -> tuple[dict[str, ShardScan], Path]:
    path = folder / PROGRESS
    known = _read_progress(path, folder, labels)
    split_of = {name: split for split, of_split in names.items() for name in of_split}
    scans = {name: known[name] for name in split_of if name in known}
    for name in scans:
        on_shard(split_of[name], len(names[split_of[name]]))
    jobs = [name for name in split_of if name not in scans]
    with open(path, "ab" if known else "wb") as file:
        if known:
            file.write(b"\n")  # the last line may be half
        else:
            _write_line(file, _options_to_json(labels))
        for name, scan in run_jobs(_scan_by_name, (folder, labels, lenient), jobs, workers=workers):
            scans[name] = scan
            if scan.sha256:
                _write_line(file, {"name": name, **_scan_to_json(scan)})
            on_shard(split_of[name], len(names[split_of[name]]))
    return {name: scans[name] for name in split_of}, path


def _scan_by_name(shared: tuple[Path, Labels, bool], name: str) -> ShardScan:
    folder, labels, lenient = shared
    try:
        return scan_shard(folder / name, labels, lenient=lenient)
    except OSError as error:
        return ShardScan(0, 0, "", np.zeros(0, INDEX_DTYPE), None, 0, {}, {}, damage=str(error.strerror))


def _raise_faults(
    folder: Path, scans: Mapping[str, ShardScan], miscounts: Iterable[tuple[str, str]], *, lenient: bool, labels: str
) -> None:
    """Raises one list of all that is wrong."""
    faults: dict[str, list[str]] = {}
    for name, scan in scans.items():
        if scan.damage:
            faults[name] = [scan.damage]
        elif not lenient:
            faults[name] = [f"{found.count} {fault} (first {found.first})" for fault, found in scan.faults.items()]
        if not (scan.damage or scan.num_keys or scan.faults):
            seen = f"only {format_counts(scan.ignored)}" if scan.ignored else "no members"
            faults.setdefault(name, []).append(f"no image samples, {seen}")
    for name, fault in miscounts:
        faults.setdefault(name, []).append(fault)
    listed = [f"{name}: {'; '.join(of_shard)}" for name, of_shard in faults.items() if of_shard]
    if not listed:
        return
    way_out = "bring damaged tars back"
    if not lenient and any(scan.faults for scan in scans.values()):
        way_out += "; --lenient leaves samples with a fault out and counts them"
    if labels == "cls" and any(NO_LABEL in scan.faults for scan in scans.values()):
        way_out += "; labels: --label-field NAME reads them from .json, --no-labels does without"
    lines = "\n  ".join(listed)
    raise ValueError(f"data {folder}: {len(listed)} of {len(scans)} shards are refused:\n  {lines}\n{way_out}")


def _find_miscounts(
    folder: Path, names: Mapping[Split, Sequence[str]], scans: Mapping[str, ShardScan]
) -> list[tuple[str, str]]:
    """Shards whose samples are not as many as a file beside them says: open_clip's and img2dataset's."""
    found = []
    for parent in sorted({(folder / name).parent for name in scans}):
        sizes = _read_json(parent / "sizes.json")
        for name, scan in scans.items():
            path = folder / name
            if path.parent != parent or scan.damage:
                continue
            stats = _read_json(parent / f"{path.stem}_stats.json")
            stated = {
                "sizes.json": sizes.get(path.name),
                f"{path.stem}_stats.json": stats.get("successes"),
            }
            found += [
                (name, f"{scan.num_keys} samples, {file} says {count!r:.20}")
                for file, count in stated.items()
                if count is not None and count != scan.num_keys
            ]
    return found + _check_total(folder, scans)


def _check_total(folder: Path, scans: Mapping[str, ShardScan]) -> list[tuple[str, str]]:
    """Compares the total with ``__len__``, which speaks of all shards of the folder and says nothing of some."""
    path = folder / "__len__"
    if not path.is_file() or {folder / name for name in scans} != set(_glob(folder, "*.tar")):
        return []
    with open(path, "rb") as file:
        stated = file.read(32).strip()
    total = sum(scan.num_keys for scan in scans.values())
    return (
        [] if stated == str(total).encode() else [("__len__", f"it says {stated!r}, the shards have {total} samples")]
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(_MAX_COUNTS_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"file {path}: not JSON ({error}); mend it or take it away") from error
    return content if isinstance(content, dict) else {}


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        found = list(folder.glob(pattern))
    except ValueError as error:
        raise ValueError(f"shard pattern {pattern!r} must be a glob: {error}") from error
    return sorted(path for path in found if not path.name.startswith(".") and not path.is_dir())


def _expand(pattern: str) -> list[str]:
    try:
        return expand_braces(pattern)
    except ValueError as error:
        raise ValueError(f"shard pattern: {error}") from error


def _has_word(folder: Path, shard: Path, words: str) -> bool:
    """Returns whether a shard's path in the folder has one of the words between its letters."""
    return bool(re.search(rf"(?<![a-z])({words})(?![a-z])", shard.relative_to(folder).as_posix().lower()))


def _find_val_by_name(folder: Path, shards: Iterable[Path]) -> tuple[list[Path] | None, str]:
    for words in (_VAL, _TEST):
        found = sorted(shard for shard in shards if _has_word(folder, shard, words))
        if found:
            return found, "val by their names"
    return None, ""


def _take_last(shards: Sequence[Path], fraction: float, folder: Path) -> tuple[list[Path], str]:
    if len(shards) < 2:
        raise ValueError(
            f"data folder {folder}: whole shards become val, and there are no two; name others with --val, or make "
            "smaller shards"
        )
    count = min(max(1, round(fraction * len(shards))), len(shards) - 1)
    return list(shards[-count:]), f"the last {count} of {len(shards)} shards are val (--val-fraction {fraction:g})"


def _check_splits(folder: Path, train: Sequence[Path], val: Sequence[Path]) -> None:
    both = sorted(set(train) & set(val))
    if both:
        raise ValueError(f"data folder {folder}: {both[0].name} would be both train and val; give --train and --val")
    if not train:
        raise ValueError(f"data folder {folder}: all its shards would be val; give --train and --val")


def _sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for of_shard in counts:
        total.update(of_shard)
    return dict(sorted(total.items()))


def _options_to_json(labels: Labels) -> dict[str, Any]:
    return {"format": 1, "labels": labels.source, "classes": None if labels.classes is None else list(labels.classes)}


def _write_line(file: IO[bytes], content: Mapping[str, Any]) -> None:
    file.write((json.dumps(content) + "\n").encode())
    file.flush()


def _scan_to_json(scan: ShardScan) -> dict[str, Any]:
    return asdict(scan) | {"rows": base64.b64encode(scan.rows.tobytes()).decode()}


def _read_progress(path: Path, folder: Path, labels: Labels) -> dict[str, ShardScan]:
    """Reads what an interrupted run with the same options knew of shards that have not changed since."""
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        lines = _whole_lines(file)
        if next(lines, None) != _options_to_json(labels):
            return {}
        known = ((line, _reuse_scan(folder, line)) for line in lines)
        return {line["name"]: scan for line, scan in known if scan is not None}


def _whole_lines(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    for line in file:
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            continue


def _reuse_scan(folder: Path, line: dict[str, Any]) -> ShardScan | None:
    try:
        return _scan_from_json(folder, line)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # gone, or not a line of ours: read again
        return None


def _scan_from_json(folder: Path, line: dict[str, Any]) -> ShardScan | None:
    status = os.stat(folder / line["name"])
    if (status.st_size, status.st_mtime_ns) != (line["bytes"], line["mtime_ns"]):
        return None
    images = line["images"]
    return ShardScan(
        bytes=line["bytes"],
        mtime_ns=line["mtime_ns"],
        sha256=line["sha256"],
        rows=np.frombuffer(base64.b64decode(line["rows"]), INDEX_DTYPE),
        images=None
        if images is None
        else ImageRange(*(tuple(images[name]) for name in ("height", "width", "channels"))),
        num_keys=line["num_keys"],
        faults={fault: Fault(**found) for fault, found in line["faults"].items()},
        ignored=line["ignored"],
    )
