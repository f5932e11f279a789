"""Quantizers of the package vector-quantize-pytorch, which is imported when one is built.

The package learns within its forward pass and draws from torch's generator. Here it learns in ``update``,
from the global batch and with a seed of the step, so that ranks agree. A run that resumes continues from the
saved state, but nobody promises that versions of the package compute the same bits.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from maskgit_pl.checks import check_choice, check_number, did_you_mean, shorten
from maskgit_pl.distributed import rank_and_world, sum_over_ranks
from maskgit_pl.networks.quantizers import Quantizer, QuantizerOutput, quantizer_output, quantizers, rows_of
from maskgit_pl.randomness import random_bits

__all__ = ["VQPyTorchQuantizer", "VQPyTorchSpec"]

log = logging.getLogger(__name__)

ClassName = Literal["VectorQuantize", "SimVQ"]

_PACKAGE = "vector_quantize_pytorch"
_INSTALL = 'run pip install "maskgit_pl[quantizers]"'
_WEIGHT = "[0, 1000000]"


def _check_switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {shorten(value)}")


def _in(interval: str) -> Callable[[str, Any], object]:
    return lambda name, value: check_number(name, value, interval)


# Options of each class, with their checks. Left out: those that add random numbers, projections, several
# indices, or statistics of one rank.
_OPTIONS: Mapping[ClassName, Mapping[str, Callable[[str, Any], object]]] = {
    "VectorQuantize": {
        "decay": _in("[0, 1)"),
        "eps": _in("(0, 1]"),
        "threshold_ema_dead_code": _in(_WEIGHT),
        "commitment_weight": _in(_WEIGHT),
        "use_cosine_sim": _check_switch,
        "rotation_trick": _check_switch,
    },
    "SimVQ": {
        "commitment_weight": _in(_WEIGHT),
        "input_to_quantize_commit_loss_weight": _in(_WEIGHT),
        "rotation_trick": _check_switch,
    },
}


class VQPyTorchQuantizer(Quantizer):
    """A quantizer of vector-quantize-pytorch; see ``VQPyTorchSpec``.

    Args:
        inner: Module of the package, for features (1, M, D) with D last.
        class_name: Name of its class.
        codebook_size: K, number of codes.
        code_dim: D, size of a code.
    """

    def __init__(self, inner: nn.Module, *, class_name: ClassName, codebook_size: int, code_dim: int) -> None:
        super().__init__(codebook_size=codebook_size, code_dim=code_dim)
        self.inner = _with_all_buffers_saved(inner)
        self.class_name = class_name
        # Its codebook must not change in the forward pass: see ``update``.
        self._arguments = {"freeze_codebook": True} if class_name == "VectorQuantize" else {}

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        """Returns the token of each place, as the package chooses it."""
        _, tokens, _ = self._quantize(features)
        return tokens.long().view(features.shape[0], -1)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Returns the codes of int64 tokens in [0, K) of any shape: (..., D) float32."""
        is_table = self.class_name == "VectorQuantize"
        codes = self.inner.get_codes_from_indices if is_table else self.inner.indices_to_codes
        with torch.autocast(tokens.device.type, enabled=False):
            rows: Tensor = codes(tokens.flatten())  # type: ignore[operator]  # a method
        return rows.float().reshape(*tokens.shape, self.code_dim)

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantizes features (B, D, h, w); the loss is that of the package."""
        quantized, tokens, loss = self._quantize(features)
        return quantizer_output(features, quantized.squeeze(0), tokens.long(), self._total(package=loss))

    def _quantize(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns codes (1, M, D), tokens (1, M) and the loss of the package."""
        with torch.autocast(features.device.type, enabled=False):
            rows = rows_of(features).float().unsqueeze(0)
            output: tuple[Tensor, Tensor, Tensor] = self.inner(rows, **self._arguments)
        return output

    @torch.no_grad()
    def update(self, tokens: Sequence[Tensor], features: Sequence[Tensor], *, seed: int, step: int) -> None:
        """Updates the moving averages of ``VectorQuantize`` and its dead codes from a global batch.

        1. Gather features and tokens in the order of the global batch, the same on each rank.
        2. Let the package learn from them, with torch's generator seeded by seed and step.
        """
        if self.class_name != "VectorQuantize":
            return
        # 1.
        rows = _gather([rows_of(part) for part in features])
        indices = _gather([part.flatten() for part in tokens])
        # 2.
        devices = [rows.device] if rows.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(random_bits("vq-pytorch", seed=seed, index=0, epoch=step, count=1)))
            self.inner.update_indices(rows.unsqueeze(0), indices.unsqueeze(0))  # type: ignore[operator]  # a method


def _with_all_buffers_saved(inner: nn.Module) -> nn.Module:
    """Puts constants that the package leaves out of the state dict into it, as loading without memory requires."""
    saved = inner.state_dict()
    for name, value in list(inner.named_buffers()):
        if name not in saved:
            owner, _, buffer_name = name.rpartition(".")
            inner.get_submodule(owner).register_buffer(buffer_name, value)
    return inner


def _gather(parts: Sequence[Tensor]) -> Tensor:
    """Returns the rows of all micro-batches and ranks, in the order in which the data module deals samples out."""
    rank, ranks = rank_and_world()
    stacked = torch.stack(list(parts))  # (A, M, ...)
    whole = stacked.new_zeros(len(parts), ranks, *stacked.shape[1:])
    whole[:, rank] = stacked
    return sum_over_ranks(whole).flatten(0, 2)


@cache
def _warn_once() -> None:
    log.warning(
        "quantizer 'vq_pytorch' is code of another package: a resumed run continues from its saved state, but is not "
        "promised to be bit-exact"
    )


@quantizers.register("vq_pytorch")
@dataclass(frozen=True)
class VQPyTorchSpec:
    """A quantizer of lucidrains/vector-quantize-pytorch, with its own losses and defaults.

    Attributes:
        class_name: ``VectorQuantize``, a table of moving averages, or ``SimVQ``.
        options: Arguments of the class. ``VectorQuantize``: ``decay``, ``eps``, ``threshold_ema_dead_code``,
            ``commitment_weight``, ``use_cosine_sim``, ``rotation_trick``. ``SimVQ``: ``commitment_weight``,
            ``input_to_quantize_commit_loss_weight``, ``rotation_trick``.

    Raises:
        ValueError: if the class or an option is unknown, or a value is out of range.

    Source: lucidrains/vector-quantize-pytorch, tested with version 1.32.
    """

    class_name: ClassName = "VectorQuantize"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("class_name", self.class_name, get_args(ClassName))
        if not isinstance(self.options, Mapping):
            raise ValueError(f"options must be a mapping of arguments, got {shorten(self.options)}")
        checks = _OPTIONS[self.class_name]
        for name, value in self.options.items():
            if name not in checks:
                text = f"options must be of {self.class_name} ({', '.join(sorted(checks))}), got {shorten(name)}; "
                raise ValueError(f"{text}{did_you_mean(str(name), checks)}".removesuffix("; "))
            checks[name](name, value)

    def check(self, *, codebook_size: int, code_dim: int) -> None:
        """Checks that the package is installed; every K and D fits.

        Raises:
            ValueError: if not.
        """
        if importlib.util.find_spec(_PACKAGE) is None:
            raise ValueError(f"quantizer 'vq_pytorch' must have the package vector-quantize-pytorch; {_INSTALL}")

    def create(self, *, codebook_size: int, code_dim: int) -> Quantizer:
        """Builds the module, and warns once that resuming is not promised to be bit-exact.

        Raises:
            ValueError: if the package is missing, or refuses the options together.
        """
        self.check(codebook_size=codebook_size, code_dim=code_dim)
        _warn_once()
        options = {**self.options, "dim": code_dim, "codebook_size": codebook_size}
        if self.class_name == "VectorQuantize":
            options["sync_codebook"] = False  # ``update`` gathers the global batch
        try:
            inner = getattr(importlib.import_module(_PACKAGE), self.class_name)(**options)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"options of {self.class_name} must fit each other: {error}") from error
        return VQPyTorchQuantizer(inner, class_name=self.class_name, codebook_size=codebook_size, code_dim=code_dim)
