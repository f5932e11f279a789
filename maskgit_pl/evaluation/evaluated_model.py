"""A model to measure, and what identifies its images in the ledger. Used by ``Evaluator``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.decodings import decoding_key
from maskgit_pl.evaluation.digests import digest_of, model_digests, shorten_digest
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.acceptance import Acceptance

__all__ = ["EvaluatedModel"]


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to measure.

    Args:
        run: Name of the run.
        pipe: The model.
        pretrained: Folder that the model was read from.
        folder: Folder of the generated images, such as ``RUN/evaluation``.
        acceptance: Rejection sampling of the generated images; None for all images. Edited images are not rejected.
    """

    run: str
    pipe: MaskGIT
    pretrained: Path
    folder: Path
    acceptance: Acceptance | None = None

    @property
    def kind(self) -> str:
        """The kind of the model in tables: "MaskGIT" or "autoregressive"."""
        return "MaskGIT" if self.pipe.transformer.mask_schedule is not None else "autoregressive"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The ledger columns that identify the model."""
        pipe = self.pipe
        networks: tuple[nn.Module, ...] = (pipe.tokenizer.network, pipe.transformer.network)
        return {
            "model": self.kind,
            "run": self.run,
            "mask_schedule": "" if pipe.transformer.mask_schedule is None else repr(pipe.transformer.mask_schedule),
            "parameters": sum(each.numel() for network in networks for each in network.parameters()),
            **{name: shorten_digest(digest) for name, digest in model_digests(pipe, self.pretrained).items()},
        }

    def decoding_key(self, decoding: DecodingConfig) -> dict[str, Any]:
        """Returns the ledger key of images: that of the decoding, and the negative model and acceptance if any."""
        key, negative = decoding_key(decoding), self.pipe.negative_model
        if self.acceptance is not None:
            key |= {"accept_rate": self.acceptance.rate, "classifier": shorten_digest(self.acceptance.digest)}
        if self.pipe.vector_pool is not None:
            key["vectors"] = shorten_digest(self.pipe.vector_pool.digest)
        if negative is not None and any(decoding.scales()):  # without guidance it changes nothing
            key["negative_model"] = shorten_digest(negative.digest)
        return key

    def samples_file(self, decoding: DecodingConfig, *, num_images: int, seed: int) -> Path:
        """Returns the file of generated images, whose name is a hash of everything that determines them."""
        digests = {name: self.identity[name] for name in ("tokenizer", "transformer", "config")}
        key = [digests, self.decoding_key(decoding), num_images, seed]
        return self.folder / f"samples-{shorten_digest(digest_of(key))}.npz"
