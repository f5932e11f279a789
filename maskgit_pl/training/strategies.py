"""Strategies for several devices.

A recipe names the strategy: ``auto`` (one device), ``ddp`` or ``fsdp``. They differ from Lightning's
strategies in three points. DDP wraps the two networks of stage 1 separately, which avoids the search for
unused parameters. FSDP2 reads and writes the same checkpoint folders as DDP. Both take batches that the data
module has already divided among the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from maskgit_pl.registry import describe
from maskgit_pl.training.checkpoints import FolderCheckpointIO, SavedTensor, local_rows

PRECISIONS = ("32-true", "bf16-mixed")
"""Precisions of training for both stages, in Lightning's names."""

_LATER = 600.0  # seconds between the limit of the watchdog and the end of a collective
_LONGEST_WAIT = 365 * 86400.0  # torch counts nanoseconds in 64 bits

_POLICIES = {
    "32-true": MixedPrecisionPolicy(),
    # Lightning's bf16-mixed is autocast, which chooses the precision of each operation: matrix products in
    # bfloat16, norms and losses in float32. This policy only sets the dtypes of the collectives. Blocks are
    # gathered in bfloat16: half the bytes, and autocast has no weights left to cast. Gradients are reduced in
    # float32. The dtypes of activations between blocks are left to autocast.
    "bf16-mixed": MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    ),
}


def build_strategy(name: str, *, longest_wait: float = 1800.0) -> str | Strategy:
    """Builds the strategy of a recipe from its name.

    Ranks may have to wait for each other for ``longest_wait`` seconds. A collective gives up later, since it ends a
    rank without a reason, and without the stacks that the watchdog writes.
    """
    if name == "auto":
        return name
    timeout = timedelta(seconds=min(longest_wait, _LONGEST_WAIT) + _LATER)
    if name == "ddp":
        return _NetworksDDP(gradient_as_bucket_view=True, timeout=timeout)
    return _FullyShardedDataParallel2(timeout=timeout)


def check_strategy(name: str, config: Any, *, stage: str, ranks: int) -> None:
    """Checks that a strategy supports a module with a configuration and a number of ranks."""
    if name == "auto" and ranks > 1:
        raise ValueError(
            f"trainer.strategy must be 'ddp' or 'fsdp' for {ranks} ranks, got 'auto'; use --cluster ddp or fsdp"
        )
    why = None
    if stage == "tokenizer":
        why = "for the tokenizer"
    elif not config.optimizer.spec.elementwise:
        why = f"with model.optimizer.algorithm {describe(config.optimizer.algorithm)!r}, which needs whole matrices"
    if name == "fsdp" and why is not None:
        raise ValueError(f"trainer.strategy must be 'ddp' or 'auto' {why}, got 'fsdp'; use --cluster ddp")


def check_precision(name: str) -> None:
    """Checks that training supports a precision."""
    if name not in PRECISIONS:
        raise ValueError(
            f"trainer.precision must be {' or '.join(PRECISIONS)}, got {name}: with 16-bit weights, a moving average "
            "with a decay of 0.999 does not move, and float16 losses are not scaled"
        )


def shard_blocks(network: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, *, precision: str) -> None:
    """Applies FSDP2 to a network: each block is one group, and all other parameters are another group.

    Weights are gathered for ``forward``, and for the methods listed in ``entry_points`` of the network or the block.
    The network is changed in place; its parameters stay float32.
    """
    for part in (*blocks, network):  # the root comes last: it takes the parameters that are left
        fully_shard(part, mesh=mesh, mp_policy=_POLICIES[precision])
        for method in getattr(part, "entry_points", ()):
            register_fsdp_forward_method(part, method)


class _NetworksDDP(DDPStrategy):
    """DDP for modules that wrap their networks themselves (``wrap_networks``), and plain DDP for all others."""

    def configure_ddp(self) -> None:
        """Wraps each network of a module with ``wrap_networks``, and any other module as a whole."""
        wrap_networks = getattr(self.lightning_module, "wrap_networks", None)
        if wrap_networks is None:
            super().configure_ddp()
        else:
            device_ids = self.determine_ddp_device_ids()
            wrap_networks(partial(DistributedDataParallel, device_ids=device_ids, **self._ddp_kwargs))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Saves on every rank (Lightning: only rank 0), so that all ranks raise the same error."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)


class _FullyShardedDataParallel2(ModelParallelStrategy):
    """FSDP2 (``fully_shard``) over all ranks. Each rank writes and reads its own rows of a checkpoint."""

    checkpoint_io: FolderCheckpointIO

    def setup_environment(self) -> None:
        """Sets the size of the device mesh: all ranks of all nodes."""
        # The number of nodes is not known before.
        self._tensor_parallel_size = 1
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns this rank's shards."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns this rank's shards, with the parameter indices of a run without sharding."""
        return getattr(optimizer, "_optimizer", optimizer).state_dict()  # Lightning's wrapper, or torch's optimizer

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Saves on every rank; each rank writes its own rows."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads this rank's rows of a checkpoint that any number of ranks has written."""
        assert self.lightning_module is not None
        # Own tensors by their keys in the checkpoint: weights, and the parameter of each optimizer state.
        values = {f"/state_dict/{name}": value for name, value in self.lightning_module.state_dict().items()}
        for optimizer_index, optimizer in enumerate(self.optimizers):
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            values |= {
                f"/optimizer_states/{optimizer_index}/state/{number}": value for number, value in enumerate(parameters)
            }

        def read(key: str, saved: SavedTensor) -> Tensor:
            like = values.get(key, values.get(key.rpartition("/")[0]))  # a moment is sharded as its parameter
            if saved.is_scalar or not isinstance(like, DTensor):
                return saved.read_all()
            rows = saved.read_rows(*local_rows(like)).to(like.device)
            return DTensor.from_local(rows, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())

        checkpoint = self.checkpoint_io.load_pieces(self.broadcast(checkpoint_path), read)
        self.lightning_module.load_state_dict(checkpoint["state_dict"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
        return checkpoint
