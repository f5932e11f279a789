"""What is asked of the files of an import before torch is loaded and anything is unpickled."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal

__all__ = ["CheckpointKind", "check_new", "checkpoint_kind"]

CheckpointKind = Literal["zip", "pickle", "safetensors"]

_HEAD = 512  # bytes; a pointer of Git LFS is shorter
_WEB_PAGE = (b"<!doctype", b"<html", b"<?xml")


def checkpoint_kind(path: Path) -> CheckpointKind:
    """Recognises a checkpoint.

    Args:
        path: E.g. ``last.ckpt``.

    Returns:
        ``zip``: what torch.save writes; ``pickle``: what it wrote before version 1.6; ``safetensors``.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is something else, or cut off.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file; name a .ckpt, .pt or .safetensors file")
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"checkpoint {path}: a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if head.lstrip().lower().startswith(_WEB_PAGE):
        raise ValueError(f"checkpoint {path}: a web page, not the weights; download the file itself")
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(path):  # its directory stands at the end
            raise ValueError(f"checkpoint {path}: the file is cut off; download it again")
        return "zip"
    if head.startswith(b"\x80"):
        return "pickle"
    if head[8:9] == b"{":  # after the length of the header
        return "safetensors"
    found = f"one that begins with {head[:8]!r}" if head else "an empty file"
    raise ValueError(f"checkpoint {path}: a file of torch.save or of safetensors is needed, got {found}")


def check_new(folder: Path) -> None:
    """Refuses to write over a folder: transformers were trained on what it holds.

    Raises:
        FileExistsError: It is there.
    """
    if folder.exists():
        raise FileExistsError(f"import {folder}: it is there already; name another folder with --out, or move it away")
