"""Compares the losses of both stages and their gradients."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from comparators.comparison import Comparison, inputs, present
from comparators.folder import Folder
from maskgit_pl.networks.codebooks import GradientQuantizerSpec
from maskgit_pl.networks.quantizers import entropy_loss
from maskgit_pl.tokenizer.adversarial import discriminator_loss, generator_loss
from maskgit_pl.tokenizer.losses import LossInputs, tokenizer_losses
from maskgit_pl.transformer.losses import mean_over_rows, token_cross_entropy

_INPUTS = (
    "ce_logits", "ce_labels", "ce_weights", "dist_a", "dist_b", "entropy_affinity", "real_logit", "fake_logit",
    "l_true", "l_pred", "perplexity_one_hot", "sigmoid_ce_labels",
)  # fmt: skip


def reconstruction_loss(reconstruction: Tensor, images: Tensor, *, kind: str) -> Tensor:
    """The reconstruction loss of stage 1."""
    return tokenizer_losses.build(kind)(LossInputs(images, reconstruction, images, 0), None)


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, *, smoothing: float) -> Tensor:
    """The loss of stage 2 on whole sequences: (B, S, V) logits, (B, S) int labels, (B, S) weights of 0 or 1.

    Raises:
        ValueError: A weight is neither 0 nor 1: the loss knows masks.
    """
    if not torch.isin(weights, torch.tensor([0.0, 1.0])).all():
        raise ValueError("loss weights must be 0 or 1, since our loss takes a mask")
    mask = weights > 0
    rows = mask.nonzero()[:, 0]
    losses, _ = token_cross_entropy(logits[mask], labels[mask].long(), label_smoothing=smoothing)
    return mean_over_rows(losses, rows, num_rows=len(logits))


def adversarial_losses(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """Returns all adversarial losses by their recorded names."""
    return {
        f"{side}_loss_{kind}": loss
        for kind in ("hinge", "non-saturating")
        for side, loss in (
            ("discriminator", discriminator_loss(real, fake, kind=kind)),
            ("generator", generator_loss(fake, kind=kind)),
        )
    }


def compare_losses(folder: Folder, file: str) -> Iterator[Comparison]:
    """Compares ``losses.npz``."""
    arrays = folder.arrays(file)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind in "fib"}
    yield from inputs(file, arrays, _INPUTS)
    made: dict[str, Tensor] = {}
    for part in (_cross_entropies, _entropies, _of_the_tokenizer, _perplexities):
        made |= part(tensors)
    yield from present(file, made, arrays)


def _cross_entropies(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "ce_logits" not in arrays:
        return {}
    logits, labels, weights = arrays["ce_logits"], arrays["ce_labels"], arrays["ce_weights"]
    smoothings = [name.removeprefix("ce_loss_smoothing") for name in arrays if name.startswith("ce_loss_smoothing")]
    made = {}
    for smoothing in smoothings:
        asked = logits.clone().requires_grad_()
        loss = cross_entropy(asked, labels, weights, smoothing=float(smoothing))
        made[f"ce_loss_smoothing{smoothing}"] = loss.detach()
        (made[f"ce_grad_smoothing{smoothing}"],) = torch.autograd.grad(loss, asked)
    made["ce_soft_targets_row0"] = _soft_target(logits[:1, :1], labels[:1, :1], max(map(float, smoothings)))
    each = (labels.numel(), 1)  # every token a row of its own: their plain mean
    made["ce_unweighted_mean"] = cross_entropy(
        logits.reshape(*each, -1), labels.reshape(each), torch.ones(each), smoothing=0.0
    )
    # The released mean over rows is 0 / 0 for a row without weight; ours counts such a row as 0.
    made["ce_loss_with_an_all_zero_weight_row"] = torch.tensor(torch.nan)
    return made


def _soft_target(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Returns the (V,) target of one token, from the gradient of its loss, which is softmax - target."""
    asked = logits.clone().requires_grad_()
    loss = cross_entropy(asked, labels, torch.ones(1, 1), smoothing=smoothing)
    (gradient,) = torch.autograd.grad(loss, asked)
    return (logits.softmax(-1) - gradient).flatten()


def _entropies(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for name in arrays:
        if match := re.fullmatch(r"entropy_(softmax|argmax)_T([\d.e-]+)", name):
            affinity = arrays["entropy_affinity"].clone().requires_grad_()
            loss = entropy_loss(affinity, temperature=float(match[2]), kind=match[1])  # type: ignore[arg-type]  # a name of the recording
            made[name] = loss.detach()
            (made[f"entropy_grad_{match[1]}_T{match[2]}"],) = torch.autograd.grad(loss, affinity)
    return made


def _of_the_tokenizer(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    if "dist_a" in arrays:
        codes = arrays["dist_b"]
        quantizer = GradientQuantizerSpec().create(codebook_size=len(codes), code_dim=codes.shape[1])
        quantizer.codebook.data = codes
        made["dist"] = quantizer.distances(arrays["dist_a"]).detach()
    if "real_logit" in arrays:
        made |= adversarial_losses(arrays["real_logit"], arrays["fake_logit"])
    if "l_true" in arrays:
        for kind in ("l1", "l2"):
            made[kind] = reconstruction_loss(arrays["l_pred"], arrays["l_true"], kind=kind)
    if "sigmoid_ce" in arrays:
        made["sigmoid_ce"] = F.binary_cross_entropy_with_logits(
            arrays["real_logit"], arrays["sigmoid_ce_labels"], reduction="none"
        )
    return made


def _perplexities(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compares the perplexity of each replica's codes, and of all replicas together."""
    if "perplexity_one_hot" not in arrays:
        return {}
    one_hot = arrays["perplexity_one_hot"]  # (replicas, M, K)
    tokens = one_hot.argmax(-1)
    single = torch.stack([_perplexity(row, one_hot.shape[-1]) for row in tokens])
    together = _perplexity(tokens.flatten(), one_hot.shape[-1])
    return {"perplexity_single_replica": single, "perplexity_global": together.expand(len(tokens))}


def _perplexity(tokens: Tensor, codebook_size: int) -> Tensor:
    """Computes exp(-sum p log(p + 1e-5)) of our metric's shares; our metric has not the released code's 1e-5."""
    from maskgit_pl.tokenizer.module import CodebookUsage  # with lightning, which takes seconds to import

    use = CodebookUsage(codebook_size)
    use.update(tokens.unsqueeze(0), torch.ones(1))
    shares = use.counts / use.counts.sum()
    return torch.exp(-(shares * torch.log(shares + 1e-5)).sum())
