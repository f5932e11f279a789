"""The reader of ``decoding.json``, the decoding settings that ``maskgit tune`` writes next to a model's weights.

Used by ``pretrained`` and by the command line. It does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskgit_pl.checks import build_dataclass, check_keys, shorten
from maskgit_pl.decoding.config import DecodingConfig
from maskgit_pl.files import read_json

__all__ = ["SETTINGS_FORMAT", "read_settings_file"]

SETTINGS_FORMAT, _VERSION = "maskgit_pl.decoding", 1


def read_settings_file(file: Path) -> tuple[DecodingConfig, dict[str, Any]]:
    """Reads the decoding settings of a file.

    Args:
        file: Path of a ``decoding.json``.

    Returns:
        The settings, and the whole content of the file. Names and ranges are checked when a decoder is built.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not JSON, has another format or version, or has unknown keys or values of a wrong
            type.
    """
    content = read_json(file)
    if (content.get("format"), content.get("version")) != (SETTINGS_FORMAT, _VERSION):
        found = f"{shorten(content.get('format'))}, version {shorten(content.get('version'))}"
        raise ValueError(
            f"decoding {file}: format must be {SETTINGS_FORMAT!r}, version {_VERSION}, got {found}; `maskgit tune RUN` "
            "writes such a file, RUN/pretrained/decoding.json"
        )
    check_keys(f"decoding {file}", content, known=content, required=("decoding",))
    return build_dataclass(DecodingConfig, content["decoding"], f"decoding {file}: decoding"), content
