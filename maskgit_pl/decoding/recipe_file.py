"""The file that says how a model is decoded, read without torch.

``maskgit tune`` writes it beside a model's weights as ``decoding.json``.
"""

from __future__ import annotations

from pathlib import Path

from maskgit_pl.checks import build_dataclass, check_keys, shorten
from maskgit_pl.decoding.config import DecodingConfig
from maskgit_pl.files import read_json

__all__ = ["read_recipe"]

_FORMAT, _VERSION = "maskgit_pl.decoding", 1


def read_recipe(file: Path) -> DecodingConfig:
    """Reads how a model is decoded.

    Args:
        file: A ``decoding.json``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON, of another format or version, or has unknown keys or values of another type.
    """
    content = read_json(file)
    if (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
        found = f"{shorten(content.get('format'))}, version {shorten(content.get('version'))}"
        raise ValueError(
            f"decoding {file}: format must be {_FORMAT!r}, version {_VERSION}, got {found}; `maskgit tune RUN` writes "
            "such a file, RUN/pretrained/decoding.json"
        )
    check_keys(f"decoding {file}", content, known=content, required=("decoding",))
    return build_dataclass(DecodingConfig, content["decoding"], f"decoding {file}: decoding")
