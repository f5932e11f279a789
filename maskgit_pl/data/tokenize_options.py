"""Options of ``tokenize``, in a module without NumPy: ``maskgit tokenize --help`` reads them and loads nothing more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from maskgit_pl.checks import check_integers, check_number


@dataclass(frozen=True)
class TokenizingConfig:
    """The settings of the work of ``tokenize``. The tokens do not depend on them.

    Args:
        batch_size: Images per batch of the tokenizer.
        part_size: Images per part that is written at a time; a kill loses at most one part.
        num_workers: Processes that decode images (default: 0 on a CPU, up to 8 with a GPU).
        unreadable_budget: Allowed fraction of unreadable images, in [0, 1].
    """

    batch_size: int = 256
    part_size: int = 1024
    num_workers: int | None = None
    unreadable_budget: float = 1e-4

    def __post_init__(self) -> None:
        check_integers(self, "tokenize ", batch_size="[1, inf)", part_size="[1, inf)", num_workers="[0, 1024]")
        check_number("data.unreadable_budget", self.unreadable_budget, "[0, 1]")


@dataclass(frozen=True)
class TokenizeOptions(TokenizingConfig):
    """The options of ``maskgit tokenize``.

    If ``crops``, ``flip`` and ``precision`` are all None, and the recipe sets neither ``data.views`` nor
    ``data.augmentations``, an existing store of the run keeps its own.

    Args:
        crops: Crops per training image, beginning with the central crop (default: data.views of the recipe, or 1).
        flip: Add the mirrored training images (default: no).
        precision: Precision of the tokenizer (default: float32).
        device: cpu, cuda:1, ...; auto takes a GPU if there is one.
    """

    crops: int | None = None
    flip: bool | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    device: str = "auto"
