"""Quantizers: features of the encoder to tokens and back, with the losses that train encoder and codes.

``VQGAN`` builds one from a recipe value (``gradient``, or ``{name: ema, decay: 0.99}``); other packages add their own
in the entry point group ``maskgit_pl.quantizers``. docs/quantizers.md lists them.
"""

from maskgit_pl.networks.quantizers.base import (
    CodebookQuantizer,
    EntropyKind,
    GradientEstimator,
    Quantizer,
    QuantizerOutput,
    QuantizerSpec,
    SizedQuantizerSpec,
    build_sized,
    entropy_loss,
    quantizers,
)
from maskgit_pl.networks.quantizers.codebooks import (
    IBQ,
    EMAQuantizer,
    EMAQuantizerSpec,
    GradientQuantizer,
    GradientQuantizerSpec,
    IBQSpec,
    SimVQ,
    SimVQSpec,
)
from maskgit_pl.networks.quantizers.lookup_free import BSQ, FSQ, LFQ, BSQSpec, FSQSpec, LFQSpec

__all__ = [
    "BSQ",
    "FSQ",
    "IBQ",
    "LFQ",
    "BSQSpec",
    "CodebookQuantizer",
    "EMAQuantizer",
    "EMAQuantizerSpec",
    "EntropyKind",
    "FSQSpec",
    "GradientEstimator",
    "GradientQuantizer",
    "GradientQuantizerSpec",
    "IBQSpec",
    "LFQSpec",
    "Quantizer",
    "QuantizerOutput",
    "QuantizerSpec",
    "SimVQ",
    "SimVQSpec",
    "SizedQuantizerSpec",
    "build_sized",
    "entropy_loss",
    "quantizers",
]
