"""Pretrained folders: ``model.safetensors`` and ``config.json`` of a tokenizer and of a transformer.

Training and importers write ``runs/RUN/pretrained/{tokenizer,transformer}/``; sampling, evaluation and stage 2 read
them. Weights are tensors and the configuration is plain JSON: nothing in the folder is executed. ``decoding.json``
beside the two, from ``maskgit tune``, replaces the decoding of the transformer's own configuration.
"""

from maskgit_pl.networks.weight_file import load_weights
from maskgit_pl.pretrained.decoding_file import (
    load_decoding,
    read_decoding,
    read_negative_model,
    remove_negative_model,
    save_decoding,
    save_negative_model,
)
from maskgit_pl.pretrained.fine_tuning import weights_for
from maskgit_pl.pretrained.folder import (
    check_stage_folder,
    copy_stage_folder,
    fingerprint,
    has_weights_of,
    load_tokenizer,
    load_transformer,
    read_config,
    save_tokenizer,
    save_transformer,
)
from maskgit_pl.pretrained.networks import PretrainedTokenizer, PretrainedTransformer, images_at_once

__all__ = [
    "PretrainedTokenizer",
    "PretrainedTransformer",
    "check_stage_folder",
    "copy_stage_folder",
    "fingerprint",
    "has_weights_of",
    "images_at_once",
    "load_decoding",
    "load_tokenizer",
    "load_transformer",
    "load_weights",
    "read_config",
    "read_decoding",
    "read_negative_model",
    "remove_negative_model",
    "save_decoding",
    "save_negative_model",
    "save_tokenizer",
    "save_transformer",
    "weights_for",
]
