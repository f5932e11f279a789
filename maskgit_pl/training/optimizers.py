"""The optimiser, its parameter groups and its learning rate, which both stages use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import AdamW, Optimizer

from maskgit_pl.checks import check_choice, check_integer, check_number
from maskgit_pl.registry import nearest

__all__ = ["AdamWKind", "LearningRate", "build_adamw", "check_betas", "parameter_groups"]

AdamWKind = Literal["fused", "foreach", "for-loop"]
"""How AdamW steps: all parameters in one kernel, one kernel an operation, or parameter by parameter."""

_DECAYED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to a peak, then constant or a half cosine down.

    The rates are those of the recipe's global batch. More devices or micro-batches share the same batch out, so nothing
    is ever rescaled by their number; whoever changes ``data.global_batch`` chooses the peak that goes with it.

    Args:
        peak: Highest learning rate, positive.
        warmup_steps: Steps from 0 to the peak.
        decay: What follows the warm-up.
        final_fraction: Where a cosine decay ends, as a fraction of the peak, in [0, 1].

    Raises:
        ValueError: A number out of range, or an unknown decay.
    """

    peak: float
    warmup_steps: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_number("learning_rate.peak", self.peak, "(0, inf)")
        check_integer("learning_rate.warmup_steps", self.warmup_steps, "[0, 9e18]")
        check_choice("learning_rate.decay", self.decay, ("constant", "cosine"))
        check_number("learning_rate.final_fraction", self.final_fraction, "[0, 1]")

    def factor(self, step: int, max_steps: int) -> float:
        """Multiplier of the peak at a step (steps done before), in [0, 1].

        Raises:
            ValueError: A decay without an end.
        """
        if self.decay == "cosine" and max_steps < 1:
            raise ValueError(f"learning rate decay 'cosine': trainer.max_steps must say where it ends, got {max_steps}")
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps))
        return self.final_fraction + (1 - self.final_fraction) * (1 + math.cos(math.pi * progress)) / 2


def check_betas(betas: tuple[float, float]) -> None:
    """Checks the decays of Adam's two moments.

    Raises:
        ValueError: if one is not in [0, 1).
    """
    for beta in betas:
        check_number("model.betas", beta, "[0, 1)")


def parameter_groups(module: nn.Module, weight_decay: float, *, prefix: str = "") -> list[dict[str, Any]]:
    """Two groups: weights of Linear and Conv layers, which decay, and everything else, which does not.

    Embeddings, tied tables, positions, codebooks, norms and biases stand in the second. Frozen parameters in none. The
    parameters carry their names, so that an optimiser's state can be told apart in a checkpoint.

    Args:
        module: What is trained.
        weight_decay: Of the first group.
        prefix: What stands before the module's parameter names in the LightningModule, e.g. ``"transformer."``.

    Source: the released configuration decays kernels only.
    """
    decayed = {id(part.weight) for part in module.modules() if isinstance(part, _DECAYED)}
    trained = [(f"{prefix}{name}", p) for name, p in module.named_parameters() if p.requires_grad]
    return [
        {"params": [(name, p) for name, p in trained if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]


def build_adamw(groups: list[dict[str, Any]], rate: LearningRate, betas: tuple[float, float], kind: AdamWKind) -> AdamW:
    """AdamW over parameter groups, at the peak of the learning rate.

    A state that is loaded keeps this kind, whatever kind wrote it.

    Args:
        groups: Of ``parameter_groups``.
        rate: Its peak.
        betas: Decays of both moments.
        kind: All compute the same; sums are rounded in another order.

    Raises:
        ValueError: Another kind.
    """
    if kind not in get_args(AdamWKind):
        raise ValueError(f"model.adamw {kind!r}: {nearest(kind, get_args(AdamWKind))}")
    optimizer = AdamW(groups, lr=rate.peak, betas=betas, fused=kind == "fused", foreach=kind == "foreach")
    optimizer.register_load_state_dict_pre_hook(_keep_kind)
    return optimizer


def _keep_kind(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state dict whose groups have the optimiser's own kind."""
    kind = {name: optimizer.param_groups[0][name] for name in ("fused", "foreach")}
    return {**state, "param_groups": [{**group, **kind} for group in state["param_groups"]]}
