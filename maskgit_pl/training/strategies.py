"""Strategies for several devices: ``auto`` (one device), ``ddp`` and ``fsdp``, by name in a recipe.

Lightning's strategies with three differences: DDP wraps the two networks of stage 1 separately, so that no search for
unused parameters is needed; FSDP2 reads and writes the same checkpoint folders as DDP; both take batches that the data
module has already divided.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from maskgit_pl.registry import nearest
from maskgit_pl.training.checkpoint_files import FolderCheckpointIO
from maskgit_pl.training.checkpoint_tensors import SavedTensor, local_rows

__all__ = [
    "PRECISIONS",
    "STRATEGIES",
    "build_strategy",
    "check_accelerator",
    "check_precision",
    "check_strategy",
    "shard_blocks",
]

PRECISIONS = ("32-true", "bf16-mixed")
"""Precisions in which both stages train, as Lightning names them."""

_POLICIES = {
    "32-true": MixedPrecisionPolicy(),
    # Lightning's bf16-mixed is autocast, which chooses the precision of each operation: products in bfloat16, norms and
    # the loss in float32 where the device's autocast says so. The policy decides what is gathered and reduced: blocks
    # are gathered in bfloat16, half the bytes, so that autocast has no weight left to cast, and gradients are summed in
    # float32. Activation dtypes between blocks are left to autocast.
    "bf16-mixed": MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    ),
}


class NetworksDDP(DDPStrategy):
    """DDP that lets a module wrap its networks itself, if it has ``wrap_networks``; else the usual DDP."""

    def configure_ddp(self) -> None:
        """Wraps the networks where the module offers it, and the whole module elsewhere."""
        wrap_networks = getattr(self.lightning_module, "wrap_networks", None)
        if wrap_networks is None:
            super().configure_ddp()
        else:
            wrap_networks(self._wrap)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Saves on every rank, so that all ranks know whether the checkpoint is written."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def _wrap(self, network: nn.Module) -> nn.Module:
        return DistributedDataParallel(network, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)


class FullyShardedDataParallel2(ModelParallelStrategy):
    """FSDP2 (``fully_shard``) over all ranks; each rank writes and reads its own rows of a checkpoint."""

    checkpoint_io: FolderCheckpointIO

    def setup_environment(self) -> None:
        """Sets the sizes of the device mesh, all ranks of all nodes, which are known only now."""
        self._tensor_parallel_size = 1
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns this rank's shards."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns this rank's shards, numbered as in a run without shards."""
        return getattr(optimizer, "_optimizer", optimizer).state_dict()  # Lightning's wrapper, or torch's own

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Saves on every rank; each writes its own rows."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads this rank's rows, whatever ranks wrote them."""
        assert self.lightning_module is not None
        own = {f"/state_dict/{name}": value for name, value in self.lightning_module.state_dict().items()}
        for place, optimizer in enumerate(self.optimizers):
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            own |= {f"/optimizer_states/{place}/state/{number}": value for number, value in enumerate(parameters)}

        def read(key: str, saved: SavedTensor) -> Tensor:
            like = own.get(key, own.get(key.rpartition("/")[0]))  # a moment is laid out as its parameter
            return saved.read_all() if like is None or saved.is_scalar else _rows_like(like, saved)

        checkpoint = self.checkpoint_io.load_pieces(self.broadcast(checkpoint_path), read)
        self.lightning_module.load_state_dict(checkpoint["state_dict"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
        return checkpoint


def _rows_like(tensor: Tensor, saved: SavedTensor) -> Tensor:
    """Returns a saved tensor with the layout of another one over ranks and devices."""
    if not isinstance(tensor, DTensor):
        return saved.read_all()
    rows = saved.read_rows(*local_rows(tensor)).to(tensor.device)
    return DTensor.from_local(rows, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())


STRATEGIES = ("auto", "ddp", "fsdp")


def build_strategy(name: str) -> str | Strategy:
    """Builds the strategy that a recipe names.

    Raises:
        ValueError: if the name is unknown.
    """
    if name == "auto":
        return name
    if name == "ddp":
        return NetworksDDP(gradient_as_bucket_view=True)
    if name == "fsdp":
        return FullyShardedDataParallel2()
    raise ValueError(f"trainer.strategy {name!r}: {nearest(name, STRATEGIES)}")


def check_strategy(name: str, *, stage: str, ranks: int) -> None:
    """Checks that a stage trains under a strategy and on a number of ranks.

    Raises:
        ValueError: if FSDP2 is set for stage 1, whose two networks train under DDP, or there are several ranks without
            a strategy.
    """
    if stage == "tokenizer" and name == "fsdp":
        raise ValueError(
            "trainer.strategy 'fsdp': the tokenizer trains under 'ddp' or 'auto'; use --cluster ddp (make: CLUSTER=ddp)"
        )
    if name == "auto" and ranks > 1:
        raise ValueError(
            f"trainer.strategy 'auto': it is for one device, got {ranks} ranks; use --cluster ddp or fsdp "
            "(make: CLUSTER=)"
        )


def check_accelerator(name: str) -> None:
    """Checks that Lightning has an accelerator of a name; this machine need not have one.

    Raises:
        ValueError: if the name is unknown.
    """
    known = ("auto", "gpu", *AcceleratorRegistry.available_accelerators())
    if name not in known:
        raise ValueError(f"trainer.accelerator {name!r}: {nearest(name, known)}")


def check_precision(name: str) -> None:
    """Checks that both stages train in a precision.

    Raises:
        ValueError: if weights would have 16 bits, or activations were float16.
    """
    if name not in PRECISIONS:
        raise ValueError(
            f"trainer.precision: {' or '.join(PRECISIONS)} is needed, got {name}: weights and their averages stay in "
            "float32, since in 16 bits an average with a decay of 0.999 stands still, and nothing scales a float16 loss"
        )


def shard_blocks(network: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, *, precision: str) -> None:
    """Shards a network over the ranks of a mesh: each block is a group, and all other parameters are one group.

    Weights are gathered for ``forward``, and for the methods that a network or a block names in ``entry_points``.

    Args:
        network: The network, changed in place; its parameters stay float32.
        blocks: Blocks of the network.
        mesh: Device mesh of one dimension.
        precision: One of ``PRECISIONS``.
    """
    for part in (*blocks, network):  # the root last, which takes the rest
        fully_shard(part, mesh=mesh, mp_policy=_POLICIES[precision])
        for method in getattr(part, "entry_points", ()):
            register_fsdp_forward_method(part, method)
