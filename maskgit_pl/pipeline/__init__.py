"""From a pretrained folder to images: ``MaskGIT``.

Used by the commands that generate and measure, in notebooks and by other programs.
"""

from maskgit_pl.pipeline.model import MaskGIT
from maskgit_pl.pipeline.options import Classes, DecodingSettings, EditOptions, GenerateOptions, OutputType, Seeds

__all__ = ["Classes", "DecodingSettings", "EditOptions", "GenerateOptions", "MaskGIT", "OutputType", "Seeds"]
