"""Digests that tell measurements apart: of plain values, and of a model beyond its weights.

Used for the keys of the ledger and of kept references.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pretrained import fingerprint

__all__ = ["digest_of", "model_digests", "shorten_digest"]

_DIGITS = 16


def digest_of(values: Any) -> str:
    """Returns the sha256, hexadecimal, of plain values: equal values have equal digests, whatever their order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def shorten_digest(digest: str) -> str:
    """Returns the first 16 digits, which files and rows are told apart by."""
    return digest[:_DIGITS]


def model_digests(pipe: MaskGIT, pretrained: Path) -> dict[str, str]:
    """Returns what decides a model's images beside decoding and seed, as sha256, hexadecimal.

    Args:
        pipe: The model.
        pretrained: The folder that it was read from.

    Returns:
        ``tokenizer`` and ``transformer``: of their weights. ``config``: of sizes, mask schedule and classes, which the
        same weights may be read with.
    """
    tokenizer, transformer = pipe.tokenizer, pipe.transformer
    config = {
        "tokenizer": asdict(tokenizer.network.config),
        "image_size": tokenizer.image_size,
        "transformer": asdict(transformer.network.config),
        "mask_schedule": repr(transformer.mask_schedule),
        "class_names": list(transformer.class_names),
    }
    return {
        "tokenizer": tokenizer.fingerprint,
        "transformer": fingerprint(pretrained / "transformer"),
        "config": digest_of(config),
    }
