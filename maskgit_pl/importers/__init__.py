"""Importers: convert weights that other projects released to pretrained folders.

- ``checkpoints`` reads files of torch, safetensors and flax as tensors by name.
- ``tokenizers``, ``transformers`` and ``released`` (MaskGIT's JAX code) have a table of names for each project.
- ``conversion`` converts tensors by such a table, writes the pretrained folder, and describes it.
"""

from typing import Literal, get_args

__all__ = ["TOKENIZER_LAYOUTS", "LayoutName"]

LayoutName = Literal["taming-transformers", "LlamaGen", "diffusers", "MaskBit", "Open-MAGVIT2", "IBQ", "open-muse"]
"""The projects whose tokenizers in torch are imported."""
TOKENIZER_LAYOUTS = get_args(LayoutName)
