"""Compares the transformer: logits, outputs of its layers, the loss and its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from comparators.comparison import TOLERANCE, Comparison, close, equal, gradients, inputs, present
from comparators.folder import Folder
from comparators.losses import cross_entropy
from maskgit_pl.importers.released import parameters, transformer_config, transformer_weights
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig

_SMOOTHING = 0.1  # of the recorded loss
_MASK = -1  # the released code's id of an unknown token


def load_transformer(folder: Folder, tag: str) -> MaskedTransformer:
    """Imports ``transformer_{tag}_checkpoint.msgpack``, whose codebook the manifest lists for ``tf{N}``."""
    arrays = parameters(folder.tree(f"transformer_{tag}_checkpoint.msgpack"))
    entry = folder.config["tf" + tag.split("_")[0].removeprefix("n")]
    return network_from(arrays, codebook_size=entry["codebook"])


def network_from(arrays: dict[str, np.ndarray], *, codebook_size: int) -> MaskedTransformer:
    """The network of a checkpoint's parameters, for evaluation."""
    config = transformer_config(arrays, codebook_size=codebook_size)
    with torch.device("meta"):
        network = MaskedTransformer(config)
    network.load_state_dict(transformer_weights(arrays, config), assign=True)
    return network.eval()


def our_tokens(sequence: np.ndarray, config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """Returns tokens (B, N) and labels (B,) of recorded sequences (B, 1 + N): class token first, -1 where unknown."""
    ids = torch.from_numpy(sequence).long()
    tokens = ids[:, 1:]
    return tokens.masked_fill(tokens == _MASK, config.mask_token_id), ids[:, 0] - config.codebook_size


def everywhere(network: MaskedTransformer, sequence: np.ndarray) -> dict[str, Tensor]:
    """Returns the logits (B, 1 + N, V) and the outputs of layers, (B, 1 + N, D) each, by their recorded names."""
    tokens, labels = our_tokens(sequence, network.config)
    modules: dict[str, nn.Module] = {"embeddings": network.embedding_norm, "mlm_hidden_after_ln": network.head_norm}
    for number, block in enumerate(network.blocks):
        modules[f"layer{number}_self_attention"] = block.get_submodule("proj")
        modules[f"layer{number}_attention_block"] = block.get_submodule("attention_norm")
        modules[f"layer{number}_output"] = block
    with recorded_outputs(modules) as outputs:
        asked = network(tokens, labels, vocabulary="all")
        # The class token's prediction, which nobody asks our network for, from the last block's output.
        every = network._head("all")(network._last_norm(outputs[f"layer{len(network.blocks) - 1}_output"]))
    return {**outputs, "logits": torch.cat([every[:, :1], asked], dim=1)}


def compare_transformer(folder: Folder, file: str) -> Iterator[Comparison]:
    """Compares ``transformer_{tag}.npz`` and the gradients beside it."""
    arrays = folder.arrays(file)
    tag = file.removeprefix("transformer_").removesuffix(".npz")
    network = load_transformer(folder, tag)
    yield from inputs(file, arrays, ["tokens", "loss_labels"])
    ours = everywhere(network, arrays["tokens"])
    ours["logits_unjitted"] = ours["logits"]
    yield from present(file, ours, arrays)
    if "loss_value" in arrays:
        yield from _compare_loss(folder, file, network, ours["logits"])


def _compare_loss(folder: Folder, file: str, network: MaskedTransformer, logits: Tensor) -> Iterator[Comparison]:
    arrays = folder.arrays(file)
    labels, weights = arrays["loss_labels"], arrays["loss_weights"]
    yield equal(file, "loss_weights", (arrays["tokens"] == _MASK).astype(np.float32), weights)
    loss = cross_entropy(logits, torch.from_numpy(labels), torch.from_numpy(weights), smoothing=_SMOOTHING)
    yield close(file, "loss_value", loss, arrays["loss_value"])
    tree = file.replace(".npz", "_grads.msgpack")
    if tree in folder:
        names, values = zip(*network.named_parameters(), strict=True)
        ours = dict(zip(names, torch.autograd.grad(loss, values), strict=True))
        config = network.config
        to_ours = lambda recorded: transformer_weights(recorded, config)  # noqa: E731  # one expression, named for the reader
        yield from gradients(tree, folder.tree(tree), ours, to_ours, tolerance=TOLERANCE)


@contextmanager
def recorded_outputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Records the outputs of modules while they run, by name."""
    outputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, given, out, name=name: outputs.__setitem__(name, out))
        for name, module in modules.items()
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
