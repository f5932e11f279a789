"""SHA-256 digests that identify settings and models in the keys of the ledger and of reference files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.pretrained import fingerprint

__all__ = ["digest_of", "model_digests", "shorten_digest"]

_DIGITS = 16


def digest_of(values: Any) -> str:
    """Returns the SHA-256 in hex of plain values; the order of mapping keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def shorten_digest(digest: str) -> str:
    """Returns the first 16 hex digits (64 bits), which file names and ledger rows hold."""
    return digest[:_DIGITS]


def model_digests(pipe: MaskGIT, pretrained: Path) -> dict[str, str]:
    """Returns the SHA-256 digests of everything that determines a model's images, except decoding and seed.

    Args:
        pipe: The model.
        pretrained: Folder that the model was read from.

    Returns:
        Digests in hex by name. ``tokenizer`` and ``transformer`` identify the weights; ``config`` identifies sizes,
        mask schedule, classes and dtype.
    """
    tokenizer, transformer = pipe.tokenizer, pipe.transformer
    # The same weights can be read with another configuration, e.g. another mask schedule, and then give other images.
    config = {
        "tokenizer": asdict(tokenizer.network.config),
        "image_size": tokenizer.image_size,
        "transformer": asdict(transformer.network.config),
        "mask_schedule": repr(transformer.mask_schedule),
        "class_names": list(transformer.class_names),
        "dtype": str(next(transformer.network.parameters()).dtype),
    }
    return {
        "tokenizer": tokenizer.fingerprint,
        "transformer": fingerprint(pretrained / "transformer"),
        "config": digest_of(config),
    }
