"""Image files as a source: a folder, a zip or a tar, with class folders, without classes, or with a metadata file.

Files ``NAME.npy`` beside the images are their vectors.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from maskgit_pl.checks import check_number
from maskgit_pl.data.image_bytes import UnreadableImageError
from maskgit_pl.data.manifest import Split
from maskgit_pl.data.samples import Sample, UnreadableSample, is_val, read_sample
from maskgit_pl.data.scan import IMAGE_EXTENSIONS
from maskgit_pl.data.sources.archives import Entries, EntryError, LeftOut, add_left_out, open_entries
from maskgit_pl.data.sources.metadata import find_metadata, read_metadata, resolve_labels
from maskgit_pl.data.vectors import MAX_VECTOR_BYTES, VECTOR_EXTENSION, VectorKind, parse_vector
from maskgit_pl.errors import printable

__all__ = ["ImageFolder"]

_VAL_FOLDERS = ("val", "valid", "validation", "test")
_MAX_LISTED = 3  # names of files that are left out


class ImageFolder:
    """Image files in a folder or an archive; ``train/`` and ``val/`` (or ``test/``) in it are the splits.

    1. With a file ``metadata.csv`` or ``metadata.jsonl``, its rows are the labels.
    2. Else each sub-folder is a class.
    3. Without sub-folders, all images have one class, named like the folder.

    The bytes of the files do not change. A hash of each file's path inside the folder determines its order and, without
    split folders, its split. So each shard has mixed classes, and adding a file never moves others between splits. The
    same files in a folder, a zip and a tar give the same shards.

    A file ``NAME.npy`` beside an image ``NAME.jpg`` is the image's vector; see ``vectors``. If one image has a vector,
    all must have one, of the same size and type.

    Args:
        path: The folder or the archive.
        classes: Class names, for the forms 1 and 3.
        val_fraction: Fraction of the files that become val if there are no split folders, in (0, 1).
        label_field: Column of the labels in a metadata file.
        vectors: True to read vectors; False leaves out all ``.npy`` files.

    Raises:
        FileNotFoundError: if there is no such folder or archive.
        ValueError: if the archive or the metadata cannot be used, there are no images, val has a class that train
            lacks, one split folder stands without the other, or a split has no files.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        classes: Sequence[str] | None = None,
        val_fraction: float = 0.1,
        label_field: str = "label",
        vectors: bool = True,
    ) -> None:
        check_number("val_fraction", val_fraction, "(0, 1)")
        self._entries = entries = open_entries(Path(path))
        roots = _split_roots(entries)
        labelled = _label_files(entries, roots, classes, label_field=label_field)
        _check_class_names(entries, labelled.classes)
        self.classes = labelled.classes
        beside = _take_vectors(entries, labelled) if vectors else {}
        self._given_labels, self._left_out = labelled.given, labelled.left_out
        parts = {root: _files_of(labelled.labels, root, beside) for root in roots.values()}
        for root, files in parts.items():
            if not files:
                raise ValueError(_no_images(entries, root, labelled.left_out))
        self.has_splits = None not in roots
        self._files = _split_files(roots, parts, val_fraction)
        self._vectors = _FolderVectors.of(entries, [file.vector for files in self._files.values() for file in files])
        count = sum(map(len, self._files.values()))
        for split, files in self._files.items():
            if not files:  # only without split folders: a hash puts few files into one split
                raise ValueError(
                    f"source {printable(entries.path)}: the {split} split must have files, got none of {count} at a "
                    f"val fraction of {val_fraction:g}; add images, set --val-fraction, or make the folders train/ and "
                    "val/"
                )

    @property
    def counts(self) -> dict[Split, int]:
        """The number of files of each split."""
        return {split: len(files) for split, files in self._files.items()}

    def describe(self) -> dict[str, Any]:
        """Returns class names, and a hash of the names and lengths of the files of each split."""
        described: dict[str, Any] = {
            "kind": "image folder",
            "classes": list(self.classes),
            "files": {split: self._digest(files) for split, files in self._files.items()},
        }
        # Without vectors or metadata, the record has no key of them.
        if self._vectors is not None:
            described["vectors"] = {
                split: self._vectors.digest(self._entries, [file.vector for file in files])
                for split, files in self._files.items()
            }
        if self._given_labels:
            described["labels"] = {
                split: hashlib.sha256(b"".join(b"%d " % file.label for file in files)).hexdigest()
                for split, files in self._files.items()
            }
        return described

    @property
    def left_out(self) -> tuple[str, ...]:
        """The files that are not images of a class, one line per kind with a count and the first names."""
        return tuple(_format_files(kind, names) for kind, names in sorted(self._left_out.items()))

    def samples(self, split: Split, places: range) -> Iterator[Sample | UnreadableSample]:
        """Yields files of a split in the order of their hashes, checked to be complete images without decoding.

        Args:
            split: ``"train"`` or ``"val"``.
            places: Range of places in the split's order.
        """
        files = self._files[split][places.start : places.stop]
        readers = self._entries.readers(name for file in files for name in (file.name, file.vector) if name is not None)
        for file in files:
            name = printable(self._entries.path / file.name)
            sample = read_sample(partial(_read_image, next(readers), name), label=file.label, name=name)
            read_vector = None if file.vector is None else next(readers)
            if self._vectors is not None and isinstance(sample, Sample):
                vector = printable(self._entries.path / _vector_name(file.name))
                sample = self._vectors.add_to(sample, vector, read_vector)
            yield sample

    def _digest(self, files: list[_File]) -> str:
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.digest + self._entries.sizes.get(file.name, 0).to_bytes(8, "little"))
        return digest.hexdigest()


class _File(NamedTuple):
    """An image of a source."""

    name: str  # in the source
    label: int
    digest: bytes  # of the name relative to the split's root; determines order and split
    vector: str | None = None  # the file NAME.npy beside NAME.jpg


@dataclass
class _Labelled:
    """The classes of a source, and the files that have one.

    Args:
        classes: Class names.
        labels: Label of each file, by its name in the source. With a metadata file, some may not exist.
        left_out: Files that are not images of a class.
        given: True if a metadata file has the labels; False if they follow from the names of the files.
    """

    classes: tuple[str, ...]
    labels: dict[str, int] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=dict)
    given: bool = False


def _read_image(read: Callable[[], bytes], name: str) -> bytes:
    try:
        return read()
    except EntryError as error:
        raise UnreadableImageError(f"image {name} {error}") from error


def _format_files(kind: str, names: Sequence[str]) -> str:
    listed = [printable(name) for name in names[:_MAX_LISTED]] + ["..."] * (len(names) > _MAX_LISTED)
    return f"{len(names)} {printable(kind)} ({', '.join(listed)})"


def _split_roots(entries: Entries) -> dict[Split | None, str]:
    """Returns the folder of each split with a trailing ``/``; one folder, the whole source, for no splits."""
    # The first of these names is the val split; without it, or without train/, sub-folders are classes.
    val = next((name for name in _VAL_FOLDERS if name in entries.folders), None)
    if "train" in entries.folders and val is not None:
        return {"train": "train/", "val": f"{val}/"}
    # One split folder without the other would become a class that is named like a split. A class may be called train
    # too: it has images in it, not folders.
    above = {folder.partition("/")[0] for folder in entries.folders if "/" in folder}
    for name in ("train", *_VAL_FOLDERS):
        if name in above or (name in entries.folders and find_metadata(entries, f"{name}/")):
            other = "val/ (or test/)" if name == "train" else "train/"
            raise ValueError(
                f"source {printable(entries.path)} must have {other} beside {name}/, got no such folder; add it, or "
                f"name {printable(entries.path / name)} to take the val split from its images"
            )
    return {None: ""}


def _label_files(
    entries: Entries, roots: dict[Split | None, str], classes: Sequence[str] | None, *, label_field: str
) -> _Labelled:
    """Returns the label of each image of the source, by its metadata or its folder."""
    found = [name for root in dict.fromkeys(["", *roots.values()]) if (name := find_metadata(entries, root))]
    if len(found) > 1 and "/" not in found[0]:
        raise ValueError(f"source {printable(entries.path)} must have one metadata file, got {' and '.join(found)}")
    if found:
        labelled = _label_by_metadata(entries, found, classes, label_field=label_field)
    else:
        labelled = _label_by_folder(entries, roots, classes)
    for kind, names in entries.left_out.items():
        labelled.left_out.setdefault(kind, []).extend(names)
    outside = {name.partition("/")[0] for name in [*entries.sizes, *entries.folders] if _root(name, roots) is None}
    beside = sorted(outside - {root.rstrip("/") for root in roots.values()} - set(found))
    if beside:
        labelled.left_out["beside the folders of the splits"] = beside
    return labelled


def _root(name: str, roots: dict[Split | None, str]) -> str | None:
    return next((root for root in roots.values() if name.startswith(root)), None)


def _label_by_metadata(
    entries: Entries, found: Sequence[str], classes: Sequence[str] | None, *, label_field: str
) -> _Labelled:
    parts = [read_metadata(entries, name, label_field=label_field) for name in found]
    names, labels = resolve_labels(parts, classes, label_field=label_field)
    labelled = _Labelled(names, given=True)
    for name, label in labels.items():
        if _is_image(name):
            labelled.labels[name] = label
        else:
            add_left_out(labelled.left_out, _suffix_kind(name), name)
    shown = " and ".join(found)
    for name in sorted(entries.sizes.keys() - labels.keys() - set(found)):
        add_left_out(labelled.left_out, f"without a row in {shown}" if _is_image(name) else _suffix_kind(name), name)
    for part in parts:
        for name in part.repeated:
            add_left_out(labelled.left_out, f"repeated rows in {part.name}", name)
        for name in part.unused:
            add_left_out(labelled.left_out, f"unused columns in {part.name}", name)
    return labelled


def _label_by_folder(entries: Entries, roots: dict[Split | None, str], given: Sequence[str] | None) -> _Labelled:
    folders = {root: _class_folders(entries, root) for root in roots.values()}
    # Labels are numbered by train's classes; val may lack some of them.
    first, *others = folders
    classes, shown = folders[first], printable(entries.path)
    unknown = sorted({name for root in others for name in folders[root]} - set(classes))
    if unknown:
        names = ", ".join(map(printable, unknown))
        raise ValueError(f"source {shown}: train/ must have all classes of {others[0]}; it lacks {names}")
    if classes and given is not None:
        raise ValueError(f"source {shown}: class names must not be given, since they are the names of its sub-folders")
    labelled = _Labelled(classes or _single_class(entries, given))
    numbers = {name: label for label, name in enumerate(classes)}
    for name in sorted(entries.sizes):
        root = _root(name, roots)
        if root is None:
            continue
        folder, _, inner = name[len(root) :].partition("/")
        if not inner and classes:
            add_left_out(labelled.left_out, "outside the class folders", name)
        elif not _is_image(name):
            add_left_out(labelled.left_out, _suffix_kind(name), name)
        else:
            labelled.labels[name] = numbers[folder] if classes else 0
    return labelled


def _class_folders(entries: Entries, root: str) -> tuple[str, ...]:
    inside = (name[len(root) :] for name in entries.folders if name.startswith(root))
    return tuple(sorted(name for name in inside if name and "/" not in name))


def _single_class(entries: Entries, given: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the name of the only class of images without sub-folders."""
    if any(name.endswith(".cls") for name in entries.sizes):
        raise ValueError(
            f"source {printable(entries.path)} must hold images, got .cls files beside them, as in WebDataset shards; "
            "use maskgit data index"
        )
    if given is not None and len(given) != 1:
        raise ValueError(
            f"source {printable(entries.path)}: 1 class name must be given for images without sub-folders, got "
            f"{len(given)}; make one sub-folder per class, or a metadata.csv with the columns file_name and label"
        )
    return tuple(given) if given is not None else (entries.title or "image",)


def _check_class_names(entries: Entries, classes: Sequence[str]) -> None:
    for name in classes:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
            raise ValueError(
                f"source {printable(entries.path)}: a class must have a UTF-8 name on one line, got "
                f"'{printable(name)}'; rename it, or use a UTF-8 locale, such as LC_ALL=C.UTF-8"
            )


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1][1:].lower() in IMAGE_EXTENSIONS


def _suffix_kind(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without an ending"


def _vector_name(image: str) -> str:
    return f"{os.path.splitext(image)[0]}.{VECTOR_EXTENSION}"


def _take_vectors(entries: Entries, labelled: _Labelled) -> dict[str, str]:
    """Returns the vector beside each image, and removes these vectors from ``labelled.left_out``."""
    taken = {name: _vector_name(name) for name in labelled.labels if _vector_name(name) in entries.sizes}
    kind = f".{VECTOR_EXTENSION}"
    unused = sorted({*labelled.left_out.pop(kind, [])} - {*taken.values()})
    if unused:
        labelled.left_out[kind] = unused
    return taken


def _files_of(labels: dict[str, int], root: str, vectors: dict[str, str]) -> list[_File]:
    """Returns the files of a folder in the order of their hashes."""
    files = []
    for name, label in labels.items():
        if name.startswith(root):
            # In UTF-8 in every locale, so that the order and the val split are the same.
            digest = hashlib.sha256(name[len(root) :].encode("utf-8", "surrogateescape")).digest()
            files.append(_File(name, label, digest, vectors.get(name)))
    return sorted(files, key=lambda file: file.digest)


def _split_files(
    roots: dict[Split | None, str], parts: dict[str, list[_File]], val_fraction: float
) -> dict[Split, list[_File]]:
    if None not in roots:
        return {split: parts[root] for split, root in roots.items() if split is not None}
    files = parts[roots[None]]
    return {
        "train": [file for file in files if not is_val(file.digest, val_fraction)],
        "val": [file for file in files if is_val(file.digest, val_fraction)],
    }


def _no_images(entries: Entries, root: str, left_out: LeftOut) -> str:
    kinds = ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
    got = ", ".join(_format_files(kind, names) for kind, names in left_out.items()) or "none"
    hint = "; unpack archives inside it, or use maskgit data index for WebDataset shards" if ".tar" in left_out else ""
    return f"source {printable(entries.path / root)} must hold {kinds} files, got {got}{hint}"


@dataclass(frozen=True)
class _FolderVectors:
    """The size and type of the vectors of a folder, which the first valid one decides.

    Args:
        kind: Size and type.
        first: Name of the vector that decided.
    """

    kind: VectorKind
    first: str

    @classmethod
    def of(cls, entries: Entries, names: Sequence[str | None]) -> _FolderVectors | None:
        """Returns the vectors of some images; None if none of them has a vector.

        Args:
            entries: Files of the source.
            names: Name of each image's vector; None for an image without one.

        Raises:
            ValueError: if there are vectors, and all of them are invalid. The message has the fault of the first.
        """
        errors: list[ValueError] = []
        present = [name for name in names if name is not None]
        for name, read in zip(present, entries.readers(present, limit=MAX_VECTOR_BYTES), strict=True):
            shown = printable(entries.path / name)
            try:
                return cls(parse_vector(_read_vector(read, shown), name=shown)[0], shown)
            except ValueError as error:
                errors.append(error)
        if errors:
            raise ValueError(f"{errors[0]}; correct the .npy files, or leave all of them out with --no-vectors")
        return None

    def add_to(self, sample: Sample, vector: str, read: Callable[[], bytes] | None) -> Sample | UnreadableSample:
        """Adds a vector to its sample.

        Args:
            sample: The sample.
            vector: The vector's name in error messages.
            read: Returns the bytes of the vector; None if the sample has none.

        Returns:
            The sample with the vector, or an ``UnreadableSample`` if the vector is missing or invalid.
        """
        if read is None:
            wanted = vector.rpartition("/")[2]
            return UnreadableSample(f"image {sample.name} must have the vector {wanted} beside it, got none")
        try:
            data = _read_vector(read, vector)
            kind, _ = parse_vector(data, name=vector)
        except ValueError as error:
            return UnreadableSample(str(error))
        if kind != self.kind:
            return UnreadableSample(f"vector {vector} must have {self.kind}, as {self.first}, got {kind}")
        return sample._replace(vector=data)

    def digest(self, entries: Entries, names: Sequence[str | None]) -> str:
        """Returns a hash of the content of all vectors, since another encoder gives files of the same lengths.

        Args:
            entries: Files of the source.
            names: Name of each image's vector; None for an image without one.
        """
        digest = hashlib.sha256()
        readers = entries.readers((name for name in names if name is not None), limit=MAX_VECTOR_BYTES)
        for name in names:
            try:
                data = b"" if name is None else _read_vector(next(readers), name)
            except ValueError:  # its sample is reported as unreadable
                data = b""
            digest.update(hashlib.sha256(data).digest())
        return digest.hexdigest()


def _read_vector(read: Callable[[], bytes], name: str) -> bytes:
    try:
        return read()
    except OSError as error:
        raise ValueError(f"vector {name} cannot be read: {error.strerror or error}") from error
    except EntryError as error:
        raise ValueError(f"vector {name} {error}") from error
