"""The pipeline ``MaskGIT``: loads a pretrained folder, generates images and edits them.

Used by the commands that generate and measure, in notebooks and by other programs. ``MaskGIT`` is imported
when it is first used, because the checks of the command line need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskgit_pl.pipeline.options import Classes, GenerateKeywords, OutputType, Seeds
from maskgit_pl.registry import lazy_names

if TYPE_CHECKING:
    from maskgit_pl.pipeline.model import MaskGIT

__all__ = ["Classes", "GenerateKeywords", "MaskGIT", "OutputType", "Seeds"]

__getattr__ = lazy_names(__name__, {"MaskGIT": "model"})
