"""The sizes of a step of stage 2 are known on the host, so that nothing in it waits for the device."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from maskgit_pl.data import Batch
from maskgit_pl.data.loader import StepDataModule
from maskgit_pl.networks.adaln import AdaLNConfig
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.transformer.token_model import TokenModel
from tests.short_runs import autoregressive_model, masked_model

SIZES = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "dropout": 0.0}
BERT = TransformerConfig(16, 3, (4, 4), **SIZES)
ADALN = AdaLNConfig(16, 3, (4, 4), **SIZES)
BACKBONES = {
    "bert": BERT,
    "bert-groups": replace(BERT, num_token_groups=2),
    "bert-causal": replace(BERT, attention="causal"),
    "adaln": replace(ADALN, condition_dim=5),
    "adaln-groups": replace(ADALN, num_token_groups=2, attention_dim=24),
    "adaln-causal": replace(ADALN, attention="causal", num_registers=0),
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "masked_cross_entropy": {},
    "codes": {"loss_vocabulary": "codes", "label_smoothing": 0.0},
    "visible": {"objective": {"name": "masked_cross_entropy", "visible_weight": 0.5}},
    "halton": {"mask_positions": "halton"},
    "truncated": {"mask_ratio": "truncated_normal"},
}


class Run:
    """A stand-in for the Trainer with the attributes that a module reads in a step."""

    global_step, global_rank, max_steps, log_every_n_steps = 1, 0, 100, 1000
    accumulate_grad_batches = world_size = 1


def build(backbone: str, objective: str = "masked_cross_entropy", **more: Any) -> TokenModel:
    """Builds a module of stage 2; the same weights for the same backbone."""
    torch.manual_seed(0)
    network, options = BACKBONES[backbone], {**OBJECTIVES[objective], **more}
    make = autoregressive_model if network.attention == "causal" else masked_model
    return make(network, "unused", **options)  # type: ignore[operator]  # two signatures


def batch(step: int = 0) -> Batch:
    index = torch.arange(8)
    chance = torch.Generator().manual_seed(5)
    tokens, vectors = torch.randint(16, (8, 16), generator=chance), torch.randn(8, 5, generator=chance)
    return Batch(tokens, index % 3, index, 0 * index, index + 8 * step, index >= 0, 0 * index - 1, vectors)


def loss_and_gradients(module: TokenModel, step: int) -> tuple[Tensor, Tensor, int]:
    drawn = module._with_draws(batch(step))
    module.zero_grad()
    loss = module._compute_training_losses(drawn).loss
    loss.backward()
    gradients = [weight.grad.flatten() for weight in module.transformer.parameters() if weight.grad is not None]
    return loss.detach(), torch.cat(gradients), len(drawn.draws.positions)


class NoWaits(TorchDispatchMode):
    """A mode that raises where a step on a GPU would copy from pageable memory of the host, and wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, outputs))
        if {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)} == {"cpu", "meta"}:
            raise AssertionError(f"{func} copies between host and device")
        return outputs


def train_on_meta(module: TokenModel) -> Tensor:
    """Runs two steps on the meta device, whose tensors have no values: reading one raises."""
    module.trainer = run = Run()  # type: ignore[assignment]  # the module has only a weak reference
    module.to("meta")
    for parameter in module.transformer.parameters():  # gradients of a new device
        parameter.grad = None
    optimizer = cast("dict[str, Any]", module.configure_optimizers())["optimizer"]
    for group in optimizer.param_groups:  # the meta device has no fused kernel
        group |= {"fused": False, "foreach": True}
    data, loss = StepDataModule(), torch.zeros(())
    for step in range(2):
        run.global_step = step + 1
        on_meta = data.transfer_batch_to_device(module._with_draws(batch(step)), torch.device("meta"), 0)
        with NoWaits():
            loss = module.training_step(on_meta, 0)
            loss.backward()
            nn.utils.clip_grad_norm_(module.transformer.parameters(), 1.0)
            module.optimizer_step(0, 0, optimizer, lambda: None)
    return loss


CASES = [*((name, "masked_cross_entropy") for name in BACKBONES), *(("bert", name) for name in OBJECTIVES)]


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "objective"), CASES)
def test_no_operation_of_a_step_waits_for_a_value(backbone, objective):
    module = build(backbone, objective)
    dropout = replace(module.config, network=replace(module.config.network, dropout=0.1))
    module.config = dropout
    assert train_on_meta(module).shape == ()
