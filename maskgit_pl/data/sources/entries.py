"""Named files inside a source: those of a folder, or those of a zip or tar. Used by ``image_folder``.

A name is the path inside the source, with ``/``. Names are never used to write files, and archives are never unpacked
to disk: an entry is read from its place in the archive.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from maskgit_pl.data.image_bytes import MAX_IMAGE_BYTES
from maskgit_pl.files import open_regular, size_text
from maskgit_pl.text import printable

__all__ = [
    "ArchiveEntries",
    "ArchiveMember",
    "Entries",
    "EntryError",
    "FolderEntries",
    "LeftOut",
    "add_left_out",
    "check_length",
]

LeftOut = dict[str, list[str]]  # names of files that are not samples, by kind

_HIDDEN = "hidden"
_UNSAFE = "with an absolute name, '..', a NUL character or more than 4096 characters"
_MAX_NAME = 4096
_REPEATED = "of a name that a later entry has too"
_MAX_WHOLE = 2**30  # bytes that any archive may hold
_MAX_RATIO = 100  # a larger archive may hold this many times its own bytes


class EntryError(ValueError):
    """An entry of an archive cannot be read. The message is a predicate: ``is damaged: ...``."""


class Entries(Protocol):
    """Files of a source by their names.

    Args:
        path: The folder or the archive.
        title: Its name without an ending, which names the class of images without classes.
        sizes: Length in bytes of each file.
        folders: Names of all folders.
        left_out: Names of what is not a readable file, by kind.
    """

    path: Path
    title: str
    sizes: dict[str, int]
    folders: set[str]
    left_out: LeftOut

    def readers(self, names: Iterable[str], *, limit: int = MAX_IMAGE_BYTES) -> Iterator[Callable[[], bytes]]:
        """Yields, for each name, a function that returns the bytes of the file.

        The functions raise ``OSError`` or ``EntryError``; each is to be called before the next one is taken.

        Args:
            names: Names of files, in any order.
            limit: Maximum length of a file in bytes.
        """


def add_left_out(left_out: LeftOut, kind: str, name: str) -> None:
    """Adds the name of a file that is not a sample."""
    left_out.setdefault(kind, []).append(name)


def check_length(size: int, limit: int) -> None:
    """Raises an ``EntryError`` if a file is longer than ``limit`` bytes."""
    if size > limit:
        raise EntryError(f"must have at most {size_text(limit)}, got {size_text(size)}")


class FolderEntries:
    """The files of a folder and of its sub-folders.

    A symbolic link to a file is that file, inside the folder or outside of it. Links to folders are not followed, so
    there are no loops. Names that begin with a dot are left out.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.title = path.resolve().name
        self.sizes: dict[str, int] = {}
        self.folders: set[str] = set()
        self.left_out: LeftOut = {}
        waiting = [""]
        while waiting:
            waiting += self._scan(waiting.pop())

    def readers(self, names: Iterable[str], *, limit: int = MAX_IMAGE_BYTES) -> Iterator[Callable[[], bytes]]:
        """Yields a function for each name; see ``Entries``."""
        return (partial(_read_file, self.path / name, limit) for name in names)

    def _scan(self, folder: str) -> Iterator[str]:
        """Takes the files of a folder, and yields the names of its sub-folders with a trailing ``/``."""
        with os.scandir(self.path / folder) as found:
            for entry in sorted(found, key=lambda entry: entry.name):
                name = folder + entry.name
                if entry.name.startswith("."):
                    add_left_out(self.left_out, _HIDDEN, name)
                elif entry.is_dir(follow_symlinks=False):
                    self.folders.add(name)
                    yield f"{name}/"
                elif entry.is_dir():
                    add_left_out(self.left_out, "symbolic links to folders, which are not followed", name)
                elif not entry.is_file():
                    add_left_out(self.left_out, "that are not regular files", name)
                else:
                    self.sizes[name] = entry.stat().st_size


def _read_file(path: Path, limit: int) -> bytes:
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        check_length(os.fstat(descriptor).st_size, limit)
        return file.read(limit)


class ArchiveMember(NamedTuple):
    """A member of an archive.

    Args:
        name: Name as stored.
        size: Length in bytes, as the archive states it.
        offset: Position in the archive: of its bytes in a tar, of its local header in a zip.
        fault: Kind under which it is left out, such as ``"links"``; empty for a file or folder.
        is_folder: True for a folder.
        packed: Length of the compressed bytes in a zip, without the header.
        checksum: CRC-32 in a zip.
        is_deflated: True for a compressed member of a zip.
    """

    name: str
    size: int
    offset: int
    fault: str = ""
    is_folder: bool = False
    packed: int = 0
    checksum: int = 0
    is_deflated: bool = False


class ArchiveEntries:
    """The files of an archive.

    If everything in the archive lies in one folder, its names begin inside that folder. Absolute names, names with
    ``..``, links, hidden names and ``__MACOSX`` are left out. Of several members with one name, the last one counts, as
    it would after unpacking.

    Args:
        path: The archive.
        title: The archive's name without its ending.
        members: Its members in their order.

    Raises:
        ValueError: if the members together are implausibly large for the archive.
    """

    def __init__(self, path: Path, title: str, members: Sequence[ArchiveMember]) -> None:
        self.path, self.title = path, title
        self.left_out: LeftOut = {}
        check_expansion(path, sum(member.size for member in members))
        files, folders = self._named_members(members)
        top = _single_folder([*files, *(f"{folder}/" for folder in folders)])
        self.title = top.rstrip("/") or title
        self.members = {name[len(top) :]: member for name, member in files.items()}
        self.sizes = {name: member.size for name, member in self.members.items()}
        parents = {parent for name in files for parent in _parents(name)}
        self.folders = {name[len(top) :] for name in folders | parents if len(name) > len(top)}

    def readers(self, names: Iterable[str], *, limit: int = MAX_IMAGE_BYTES) -> Iterator[Callable[[], bytes]]:
        """Yields a function for each name; see ``Entries``."""
        return (partial(self._read, name, limit) for name in names)

    def read_member(self, member: ArchiveMember) -> bytes:
        """Returns the bytes of a member of at most 256 MiB.

        Raises:
            OSError: if the archive cannot be read.
            EntryError: if the member is damaged.
        """
        raise NotImplementedError

    def member(self, name: str, *, limit: int) -> ArchiveMember:
        """Returns the member of a name.

        Raises:
            FileNotFoundError: if there is none.
            EntryError: if it is longer than ``limit`` bytes.
        """
        if name not in self.members:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        check_length(self.members[name].size, limit)
        return self.members[name]

    def _read(self, name: str, limit: int) -> bytes:
        return self.read_member(self.member(name, limit=limit))

    def _named_members(self, members: Iterable[ArchiveMember]) -> tuple[dict[str, ArchiveMember], set[str]]:
        """Returns the files by their cleaned names and the names of folders, and notes what is left out."""
        files, folders, hidden = dict[str, ArchiveMember](), set[str](), dict[str, None]()
        for member in members:
            name = _clean_name(member.name)
            if name is None:
                add_left_out(self.left_out, _UNSAFE, member.name)
            elif not name:  # the folder "./" itself
                continue
            elif (secret := _hidden_part(name)) is not None:
                hidden[secret] = None
            elif member.fault:
                add_left_out(self.left_out, member.fault, name)
            elif member.is_folder:
                folders |= {name, *_parents(name)} - {""}
            else:
                if name in files:
                    add_left_out(self.left_out, _REPEATED, name)
                files[name] = member
        if hidden:
            self.left_out[_HIDDEN] = list(hidden)
        return files, folders


def check_expansion(path: Path, size: int) -> None:
    """Checks that an archive does not hold implausibly many bytes.

    Args:
        path: The archive.
        size: Bytes of its members together.

    Raises:
        ValueError: if this is more than 1 GiB and more than 100 times the length of the archive.
    """
    limit = max(_MAX_WHOLE, _MAX_RATIO * path.stat().st_size)
    if size > limit:
        raise ValueError(
            f"archive {printable(path)} must hold at most {size_text(limit)}, which is {_MAX_RATIO} times its length "
            f"or 1 GiB, got {size_text(size)} or more; unpack it, and name the folder"
        )


def _clean_name(name: str) -> str | None:
    """Returns a name without empty parts and ``.``; None if it leads out of the archive."""
    if name.startswith("/") or "\0" in name or name[1:3] in (":/", ":\\") or len(name) > _MAX_NAME:
        return None
    parts = name.split("/")
    if ".." in parts:
        return None
    return "/".join(part for part in parts if part not in ("", "."))


def _hidden_part(name: str) -> str | None:
    """Returns a name up to its first hidden part; None if it has none."""
    parts = name.split("/")
    places = (place for place, part in enumerate(parts, 1) if part.startswith(".") or part == "__MACOSX")
    place = next(places, None)
    return None if place is None else "/".join(parts[:place])


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition("/")[0]:
        yield name


def _single_folder(names: Sequence[str]) -> str:
    """Returns the folder in which all names lie, with a trailing ``/``; empty if there is none."""
    tops = {name.partition("/")[:2] for name in names}
    return "".join(tops.pop()) if len(tops) == 1 and all("/" in name for name in names) else ""
