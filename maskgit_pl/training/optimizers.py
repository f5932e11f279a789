"""AdamW and its parameter groups, for both stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import AdamW, Optimizer

from maskgit_pl.checks import check_choice, check_number
from maskgit_pl.training.learning_rates import LearningRate

__all__ = ["AdamWKind", "OptimizerConfig", "build_adamw", "parameter_groups"]

AdamWKind = Literal["fused", "foreach", "for-loop"]
"""Implementations of AdamW in torch: one kernel for everything, one kernel per operation, or one per parameter."""

_DECAYED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class OptimizerConfig:
    """The configuration of AdamW and its learning rate.

    Args:
        learning_rate: Peak, warm-up and decay.
        betas: Decay rates of the first and the second moment, each in [0, 1).
        weight_decay: Weight decay of Linear and Conv weights, in [0, 10]; see ``parameter_groups``.
        adamw: Implementation of the step. All implementations compute the same up to rounding.

    Raises:
        ValueError: if a number is out of range or the implementation is unknown.
    """

    learning_rate: LearningRate
    betas: tuple[float, float]
    weight_decay: float
    adamw: AdamWKind = "fused"

    def __post_init__(self) -> None:
        for beta in self.betas:
            check_number("betas", beta, "[0, 1)")
        check_number("weight_decay", self.weight_decay, "[0, 10]")
        check_choice("adamw", self.adamw, get_args(AdamWKind))


def parameter_groups(module: nn.Module, weight_decay: float, *, prefix: str = "") -> list[dict[str, Any]]:
    """Divides the trained parameters into weights of Linear and Conv layers, which decay, and all others.

    Embeddings, tied tables, positions, codebooks, norms and biases are in the second group. Frozen parameters are in
    neither group. Each parameter keeps its name, which identifies its optimizer state in a checkpoint.

    Args:
        module: The trained network.
        weight_decay: Weight decay of the first group.
        prefix: Prefix of the parameter names in the LightningModule, such as ``"transformer."``.

    Returns:
        Two parameter groups for ``torch.optim``.

    Source: the released configuration of MaskGIT, which decays kernels only.
    """
    # By identity: a tied weight belongs to one group, under its first name.
    decayed = {id(part.weight) for part in module.modules() if isinstance(part, _DECAYED)}
    trained = [(f"{prefix}{name}", p) for name, p in module.named_parameters() if p.requires_grad]
    return [
        {"params": [(name, p) for name, p in trained if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]


def build_adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> AdamW:
    """Builds AdamW over parameter groups, with the peak as its learning rate.

    The implementation stays the same when the optimizer loads a state that another implementation wrote.

    Args:
        groups: Parameter groups, which hold the weight decay; see ``parameter_groups``.
        config: Betas, peak and implementation.
    """
    fused, foreach = config.adamw == "fused", config.adamw == "foreach"
    optimizer = AdamW(groups, lr=config.learning_rate.peak, betas=config.betas, fused=fused, foreach=foreach)
    optimizer.register_load_state_dict_pre_hook(_keep_kind)
    return optimizer


def _keep_kind(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Returns a state dict in which the groups have the implementation of ``optimizer``."""
    kind = {name: optimizer.param_groups[0][name] for name in ("fused", "foreach")}
    return {**state, "param_groups": [{**group, **kind} for group in state["param_groups"]]}
