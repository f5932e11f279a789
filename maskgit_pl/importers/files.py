"""Checks of the files that an import reads and of the folder that it writes, and names of the imported classes.

Imports no torch, so that wrong files and folders are refused at once. Released checkpoints hold no class names.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

from maskgit_pl.data.folders import has_content, resolve_folder

__all__ = [
    "TOKENIZER_LAYOUTS",
    "Format",
    "LayoutName",
    "check_flax_file",
    "check_out",
    "check_torch_file",
    "choose_class_names",
    "find_weights",
    "read_class_names",
]

Format = Literal["msgpack", "pickle", "safetensors", "zip"]

LayoutName = Literal["taming-transformers", "LlamaGen", "diffusers", "MaskBit", "Open-MAGVIT2", "IBQ", "open-muse"]
"""The layouts of tokenizers that are imported."""
TOKENIZER_LAYOUTS = get_args(LayoutName)
_IMAGENET_CLASSES = 1000
_DIFFUSERS = tuple(f"diffusion_pytorch_model.{ending}" for ending in ("safetensors", "fp16.safetensors", "bin"))
_HEAD = 512  # bytes; a pointer of Git LFS is shorter
# Recognised in this order: the first bytes of msgpack are the least distinctive.
_BEGINNINGS: tuple[tuple[str, str, Callable[[bytes], bool]], ...] = (  # format, its name for people, its first bytes
    ("lfs", "a Git LFS pointer; fetch the weights with `git lfs pull`", lambda h: h.startswith(b"version https://git-lfs")),
    ("html", "a web page; the download went wrong", lambda h: h.lstrip()[:1] == b"<"),
    ("pickle", "a Python pickle", lambda h: h[:1] == b"\x80" and 2 <= int.from_bytes(h[1:2], "big") <= 5),
    ("zip", "a zip archive, as torch.save and numpy.savez write them", lambda h: h.startswith(b"PK\3\4")),
    ("gzip", "a gzip archive; unpack it first", lambda h: h.startswith(b"\x1f\x8b")),
    ("tar", "a tar archive; unpack it first", lambda h: h[257:262] == b"ustar"),
    ("safetensors", "a safetensors file", lambda h: h[8:9] == b"{" and int.from_bytes(h[:8], "little") < 1 << 32),
    ("hdf5", "an HDF5 file", lambda h: h.startswith(b"\x89HDF\r\n\x1a\n")),
    ("numpy", "a numpy file", lambda h: h.startswith(b"\x93NUMPY")),
    ("json", "JSON text", lambda h: h.lstrip()[:1] == b"{"),
    ("msgpack", "", lambda h: 0x80 <= h[0] <= 0x8F or h[0] in (0xDE, 0xDF)),
)  # fmt: skip


def check_flax_file(path: Path) -> None:
    """Checks by its first bytes that a file is flax's msgpack.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder, an empty file, or of another format.
    """
    _check_format(path, ("msgpack",), "a msgpack file of flax (as released, about 200 or 700 MB)")


def check_torch_file(path: Path) -> Format:
    """Checks by its first bytes that a file is a checkpoint of torch or safetensors, and returns its format.

    Returns:
        ``zip``: format of torch.save; ``pickle``: its format before version 1.6; ``safetensors``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder, an empty file, of another format, or a zip archive that is cut off.
    """
    return _check_format(path, ("zip", "pickle", "safetensors"), "a file of torch.save or of safetensors")


def find_weights(path: Path) -> Path:
    """Returns the file of weights that a path names.

    Args:
        path: A file, a folder in which diffusers saved a VQModel, or one of a pipeline with its ``vqvae``; any other
            path is returned as it is.
    """
    names = [path / folder / name for folder in ("", "vqvae") for name in _DIFFUSERS]
    return next((name for name in names if name.is_file()), path)


def check_out(folder: Path) -> None:
    """Checks that an import can write a folder without overwriting anything: transformers may depend on what is there.

    Raises:
        FileExistsError: if it exists, unless it is an empty folder.
        NotADirectoryError: if one of its parents is a file.
        ValueError: if it cannot be written (``folders.resolve_folder``).
    """
    if folder.is_symlink() or has_content(folder) or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(
            f"import {folder} must be a new or empty folder, got one with content; name another with --out"
        )
    # The nearest existing parent: the folders below it are made when the import is written.
    above = next(path for path in folder.absolute().parents if path.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"import {folder} must lie in a folder, got the file {above}")
    resolve_folder("--out", folder)


def read_class_names(path: Path) -> list[str]:
    """Reads class names, one per line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"class names {path}: no such file; name a text file with one name per line")
    try:
        # Windows writes a byte order mark.
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"class names {path} must be a text in UTF-8, one name per line ({error})") from error


def choose_class_names(given: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Returns the names of the classes of an imported transformer, whose file has none.

    Args:
        given: One name per class; None for ImageNet's names if there are 1000 classes, otherwise numbers.
        num_classes: Number of classes of the transformer.

    Raises:
        ValueError: if the number of names is wrong, or one is empty.
    """
    if given is None:
        return _imagenet_names() if num_classes == _IMAGENET_CLASSES else tuple(map(str, range(num_classes)))
    names = tuple(given)
    if len(names) != num_classes:
        raise ValueError(
            f"class names must be {num_classes}, one for each class of the transformer, got {len(names)}; change "
            "the list, or leave it out"
        )
    empty = next((number for number, name in enumerate(names) if not name.strip()), None)
    if empty is not None:
        raise ValueError(f"class names must not be empty, got an empty one for class {empty}")
    return names


def _check_format(path: Path, accepted: Sequence[Format], description: str) -> Format:
    """Returns the format of a file, which must be one of the accepted ones."""
    rule = f"checkpoint {path} must be {description}"
    if path.is_dir():
        raise ValueError(f"{rule}, got a folder; name the file itself")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file; download it, or name another")
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    if not head:
        raise ValueError(f"{rule}, got an empty file; download it again")
    found, text = next(((name, text) for name, text, begins in _BEGINNINGS if begins(head)), ("", ""))
    for wanted in accepted:
        if wanted == found:
            if wanted == "zip" and not zipfile.is_zipfile(path):  # the directory of a zip is at its end
                raise ValueError(f"checkpoint {path}: the file is cut off; download it again")
            return wanted
    raise ValueError(f"{rule}, got {text or f'one that begins with {head[:8]!r}'}")


def _imagenet_names() -> tuple[str, ...]:
    """Returns the first name of each class of ILSVRC 2012, in the order of its synset ids."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    return tuple(info.index_to_description(number).partition(",")[0].strip() for number in range(_IMAGENET_CLASSES))
