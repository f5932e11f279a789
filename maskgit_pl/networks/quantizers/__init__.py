"""Quantizers: features of the encoder to tokens and back, with the losses that train encoder and codes.

``VQGAN`` builds one from a recipe value (``gradient``, or ``{name: ema, decay: 0.99}``); other packages add their own
in the entry point group ``maskgit_pl.quantizers``. docs/quantizers.md lists them.
"""

from maskgit_pl.networks.quantizers.base import (
    CodebookQuantizer,
    Quantizer,
    QuantizerOutput,
    QuantizerSpec,
    SizedQuantizerSpec,
    build_sized,
    quantizers,
)
from maskgit_pl.networks.quantizers.codebooks import (
    EMAQuantizer,
    EMAQuantizerSpec,
    GradientQuantizer,
    GradientQuantizerSpec,
)
from maskgit_pl.networks.quantizers.entropy import EntropyKind, entropy_loss

__all__ = [
    "CodebookQuantizer",
    "EMAQuantizer",
    "EMAQuantizerSpec",
    "EntropyKind",
    "GradientQuantizer",
    "GradientQuantizerSpec",
    "Quantizer",
    "QuantizerOutput",
    "QuantizerSpec",
    "SizedQuantizerSpec",
    "build_sized",
    "entropy_loss",
    "quantizers",
]
