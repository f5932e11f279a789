"""The formats of exported graphs by name. Imports no torch, so that the command line can check its flags at once."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["FORMATS", "Format"]

Format = Literal["onnx", "pt2"]

FORMATS: tuple[Format, ...] = get_args(Format)
"""The names of the formats, which are also the suffixes of the files."""
